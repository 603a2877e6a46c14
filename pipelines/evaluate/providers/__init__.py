"""The systems that can be evaluated, each behind the same interface; `base.py` holds it."""
