"""How good predictors are, on problems that they were not trained on."""
