"""Benchmark datasets by name, and the prompts built from their rows."""
