"""Stage three: word error rates, from raw audio. `stage.py` is the stage."""
