"""Benchmarks: speed and memory of the store and of each stage, beside plain alternatives measured in the same run."""
