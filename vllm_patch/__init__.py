"""How routing leaves vLLM: a plugin that hooks expert selection in the fused MoE layers and streams it to Parquet.

The plugin is found by vLLM through the entry point group `vllm.general_plugins` and does nothing unless the environment
variable `SPECMOE_CAPTURE` is set to 1. `plugin` wires it in, `hook` finds and wraps the routers, `steps` labels rows with
their requests, `recorder` collects and writes them.
"""
