"""Offloaded experts: simulated caches, prefetching, and estimated tokens per second.

- `state`, `eviction_policies`: the record of an expert, and which expert is evicted. `cache` is a cache for real slots with the
  same policies; `policy_scores` has the scores that learned policies follow.
- `requests`: which experts each layer of each step needs, from a trace.
- `plans`: which experts are prefetched, and when, from a predictor.
- `costs`: the seconds that transfers and computation take, from a model and a device.
- `simulation`: the requests, played against a cache event by event.
- `curves`: hits of every cache size, experts in use, and slots for each layer.
- `studies`, `simulation_page`: many simulations or replays of one trace, and what `specmoe simulate` writes.
- `fitting`: whether a model fits on a GPU, and how fast it is expected to be.
- `devices`, `replay`: the same tokens with real transfers and GEMMs of dummy experts.
- `numba_recompiling`: what numba compiled is kept up to date.
"""
