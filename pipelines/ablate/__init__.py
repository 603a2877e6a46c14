"""Many stage twos over one store: every combination of a grid. `sweep.py` runs them."""
