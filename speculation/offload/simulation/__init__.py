"""The simulation of one cache of experts, event by event. Everything but its entry point is compiled.

- `simulate`: the entry point: what is simulated, and its result.
- `event_loop`: the requests, one after the other, in order of time.
- `misses`: demand loads, and experts that the host computes. `background`: prefetches and fills.
- `occupancy`: which expert is in which slot, and which one leaves.
- `host_memory`: experts in host memory, over storage.
- `records`: what is counted, and the state that the compiled functions change.
"""
