"""Expert predictors: learn from traces which experts come next, and judge every predictor the same way."""
