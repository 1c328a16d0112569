"""Speed of a real model whose experts are on disk or in host memory: `python -m benchmarks.runtime`."""
