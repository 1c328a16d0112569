"""Routers inside vLLM: where they are, and whether what they choose can be recorded.

- `hook`: finds a model's MoE layers and wraps their selection of experts; `gates` saves the routers' weights.
- `kernels`: makes vLLM choose kernels that call the wrapped function.
- `speculative`, `deviations`: forms of speculative decoding, and routers that compute something else than the model defines.
"""
