"""What a cache of every size would hit, and what `specmoe curve` writes.

- `hit_curves`: hits of every cache size, from one pass over the requests.
- `working_sets`: experts in use within some tokens.
- `slots`, `division`: how many slots each layer gets.
- `curve_study`, `curve_page`: the curves of a trace, as a document and a page.
"""
