"""`python -m vllm_patch check`: does capture work with this vLLM, on this device, for these models?

`families` creates small models with random weights, `jobs` lists the runs, `worker` runs them in separate processes,
`agreement` compares recorded routing with `transformers`, `overhead` times capture, and `results` defines the result document.
`run` runs everything, the most valuable steps first, within a time limit.
"""
