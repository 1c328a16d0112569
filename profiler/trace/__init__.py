"""The trace on disk: its format, writer and reader, and operations on whole traces (merge, split, export)."""
