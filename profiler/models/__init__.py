"""Models and GPUs: the registry of short names, MoE facts read from model configs, and support for DeepSeek-MoE v1."""
