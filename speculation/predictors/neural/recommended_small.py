"""A smaller version of `recommended`: below 1 MB, and fast enough to be called before every layer."""

from __future__ import annotations

from typing import ClassVar

from speculation.predictors.neural.recommended import Recommended
from speculation.predictors.options import TrainingOptions


class RecommendedSmall(Recommended):
    """`Recommended` with a narrow state, one window of recent use, and a small vocabulary."""

    name: ClassVar[str] = "recommended-small"
    about: ClassVar[str] = "recommended, narrower: below 1 MB for a model of 24 layers of 32 experts"
    default_width: ClassVar[int] = 48
    token_width: ClassVar[int] = 8
    max_vocabulary: ClassVar[int] = 2048
    windows: ClassVar[tuple[int, ...]] = (32,)
    defaults: ClassVar[TrainingOptions] = TrainingOptions(epochs=8, batch_tokens=512, dropout=0.05, learning_rate=4e-3)
