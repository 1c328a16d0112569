"""What router inputs are worth to a predictor: `python -m benchmarks.router_inputs`."""
