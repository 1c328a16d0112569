"""Capture of a server's traffic, and the process that seals the traces after the server has exited."""
