"""The trace on disk: its format, rows, writer and reader, and what is done with whole traces."""
