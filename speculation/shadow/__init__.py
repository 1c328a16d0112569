"""Shadow mode: a predictor scored on requests of a running engine, in a process of its own.

The engine starts `python -m speculation.shadow` (`vllm_patch.live.shadow_feed`) and passes sampled requests through a pipe.
"""
