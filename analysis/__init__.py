"""Statistics of routing: pure functions and mergeable accumulators over `RoutingChunk`s, and the HTML report."""
