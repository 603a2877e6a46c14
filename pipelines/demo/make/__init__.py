"""What made the bundled stand-ins: corpus, encoder and decoder. `python -m pipelines.demo.make`. Not in the wheel."""
