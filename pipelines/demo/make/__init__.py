"""What made the bundled corpus, encoder and decoder: `python -m pipelines.demo.make`. Not in the wheel."""
