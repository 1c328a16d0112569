"""Studies: many simulations or replays of one trace, as one document.

- `sweep`: one workload with every cache size, policy and way of prefetching; `gap_to_belady` compares policies.
- `token_outcomes`: a cache's outcome for each expert of single tokens. `host_measure`: how fast this host computes experts.
- `simulation_options`, `simulated_devices`, `simulation_study`: what `specmoe simulate` computes.
- `replay_study`: the same tokens with real transfers.
"""
