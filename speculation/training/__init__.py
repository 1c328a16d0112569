"""Train a predictor on a trace and store it as a run directory."""
