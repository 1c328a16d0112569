"""Predictors that count: one file each."""
