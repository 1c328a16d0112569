"""Experts where they are kept: their bytes, the checkpoint's files, and reads from host memory or from disk.

- `layout`: the weights of an expert one after the other, as they are transferred.
- `integer_groups`, `mxfp4`: experts in fewer bits.
- `checkpoint`: where each expert is in the files of a checkpoint.
- `expert_stores`: all experts in host memory or on disk, read one at a time.
"""
