"""Neural predictors, one file each; `base`, `context` and `training_loop` hold what they share.

- `places`: what was used at earlier places of the same tokens, for `recommended` and `reuse`.
- `streams`: these two one token at a time, in compiled loops.
"""
