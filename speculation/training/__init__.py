"""Fitting a predictor to a trace and storing it as a run."""
