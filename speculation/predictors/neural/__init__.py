"""Predictors that are networks: one file each; `base` and `loop` are what they share."""
