"""Counts of routing that can be merged across chunks, shards and threads, and their compiled loops."""
