"""Counts of routing that add up over chunks, shards and threads, and their compiled loops."""
