"""Collect a trace: select problems, run an engine over them, resume an interrupted collection."""
