"""Offloaded experts: simulated caches, prefetching, and estimated tokens per second.

- `requests`: which experts each layer of each step needs, from a trace.
- `plans`: which experts are prefetched, and when, from a predictor.
- `costs`: the seconds that transfers and computation take, from a model and a device.
- `state`, `policies`: the record of an expert, and which expert is evicted. `cache` is a cache for real slots with the same
  policies; `evictors` turns predictors of reuse into one; `gap` says how near a policy comes to the optimum.
- `kernel`, with `misses` (demand loads and the host), `background` (prefetches), `eviction` and `ram` (host memory over
  storage): the compiled, event-by-event simulation. `simulate` is its entry point; `recompiling` keeps what was
  compiled up to date.
- `sweep`, `study`: many simulations of one trace, and what `specmoe simulate` writes.
- `curves`, `working_set`, `slots`, `curve_study`: hits of every cache size, experts in use, and slots for each layer.
- `fitting`: whether a model fits on a GPU, and how fast it is expected to be.
- `devices`, `replay`, `replay_study`: the same tokens with real transfers and GEMMs of dummy experts.
"""
