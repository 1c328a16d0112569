"""Live metrics of a running engine: their names, how processes publish them, and the view of `specmoe watch`."""
