"""A folder for the hub: model, card with measured numbers, evaluations. `stage.py` makes it."""
