"""Measurements, as ratios in one run: `python -m benchmarks.NAME` from the repository's root."""
