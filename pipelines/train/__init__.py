"""Stage two: training the projector from a feature store. `stage.py` is the stage."""
