"""The small form of `reuse`: less than 1 MB, and fast enough for one CPU thread next to the model."""

from __future__ import annotations

from typing import ClassVar

from speculation.predictors.neural.reuse import Reuse


class ReuseSmall(Reuse):
    """`Reuse` with a narrow network for the token, fewer token embeddings and no training texts."""

    name: ClassVar[str] = "reuse-small"
    about: ClassVar[str] = "the small form of reuse, under 1 MB"
    sees: ClassVar[str] = "all earlier routes, which tokens they are"
    default_width: ClassVar[int] = 48
    token_width: ClassVar[int] = 16
    max_vocabulary: ClassVar[int] = 4096
    memory_bytes: ClassVar[int] = 0
