"""Networks one token at a time, as a model generates: the same results, without PyTorch's overhead for a single token.

- `single_token`: layers of networks as compiled loops.
- `recommended_stream`, `reuse_stream`: the predictors `recommended` and `reuse`, built of them.
"""
