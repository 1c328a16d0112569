"""`python -m vllm_patch check`: does capture work with this vLLM, on this device, for these models?

`families` makes small models with random weights, `jobs` says what is run, `worker` runs it in processes of its own,
`agreement` compares what was recorded with `transformers`, `overhead` times capture, and `results` holds what was found.
`run` does all of it in the order of its worth and stops in time.
"""
