"""Stage two: the projector, trained from a feature store. `stage.py` is the stage."""
