"""The folder of a model for the hub: weights, code, card and evaluations. `stage.py` makes it."""
