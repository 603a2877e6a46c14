"""Stage one: the frozen encoder, once over a corpus, into a feature store. `stage.py` is the stage."""
