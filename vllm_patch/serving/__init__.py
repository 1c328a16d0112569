"""Capture of a server's traffic, and the process that seals it when the server is gone."""
