"""Neural predictors, one file each; `base`, `context` and `loop` hold what they share."""
