"""One module per foreign format: `NAME`, `ABOUT`, `KINDS`, `detect` and `read`, which `profiler.importers` registers."""
