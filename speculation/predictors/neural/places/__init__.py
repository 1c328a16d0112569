"""Earlier places of the same tokens, in the same text and in training texts, and the experts that were used there.

- `text_memory`: routes of training texts. `reuse_memory`: the same for the prediction of reuse.
- `similar_places`: which places count, and how much they agree with what is known now; `place_attention` weighs them.
- `reuse_features`: how recently each expert was used, and what followed earlier occurrences of the same tokens.
"""
