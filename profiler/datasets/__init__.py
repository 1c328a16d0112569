"""Benchmark datasets by name, and their rows as prompts."""
