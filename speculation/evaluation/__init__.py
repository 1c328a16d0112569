"""Evaluation of expert predictors on held-out problems: metrics, evaluations, leaderboards."""
