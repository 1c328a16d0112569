"""Measurements, as ratios within one run: `python -m benchmarks.NAME` from the root of the repository."""
