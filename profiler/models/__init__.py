"""Models by name: what their configs say, the registry, GPUs, and DeepSeek v1."""
