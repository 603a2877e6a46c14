"""Ablations: many runs of stage two over one store. `sweep.py` runs a grid."""
