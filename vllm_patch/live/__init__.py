"""Live metrics of a running engine: counts of its routing, requests for the scoring process, and the place on `/metrics`."""
