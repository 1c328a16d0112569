"""A smaller version of `recommended`, fast enough to be called before every layer.

One layer ahead, it takes at most 1 MB for models of up to 48 layers of 64 experts.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch

from speculation.data.tasks import Shape
from speculation.predictors.neural.base import NetworkConfig
from speculation.predictors.neural.recommended import Recommended
from speculation.predictors.options import TrainingOptions

# What a stored predictor should take. For larger models and horizons even the narrowest network takes more.
MAX_BYTES = 1_000_000
# Of this, at most so much is for the typical routes.
TYPICAL_BYTES = 200_000
WIDTHS = (48, 40, 32, 24, 16)


class RecommendedSmall(Recommended):
    """`Recommended` with a narrow state, one window of recent use, a small vocabulary, and no training texts but the typical
    route of each token. The state is as wide as MAX_BYTES allow for the model.
    """

    name: ClassVar[str] = "recommended-small"
    about: ClassVar[str] = "recommended, narrower: below 1 MB for a model of 24 layers of 32 experts"
    sees: ClassVar[str] = "all routes that the task allows, which tokens they are"
    default_width: ClassVar[int] = WIDTHS[0]
    token_width: ClassVar[int] = 8
    max_vocabulary: ClassVar[int] = 1536
    places: ClassVar[int] = 8
    memory_bytes: ClassVar[int] = 0
    windows: ClassVar[tuple[int, ...]] = (32,)
    defaults: ClassVar[TrainingOptions] = TrainingOptions(
        epochs=None, seen_tokens=1_350_000, batch_tokens=512, dropout=0.05, learning_rate=4e-3
    )

    def __init__(self, shape: Shape, keys: npt.NDArray[np.int64] | None = None, config: NetworkConfig | None = None) -> None:
        super().__init__(shape, keys, config or NetworkConfig(width=self._width_for(shape)))

    @classmethod
    def typical_tokens(cls, shape: Shape) -> int:
        return min(super().typical_tokens(shape), TYPICAL_BYTES // _typical_bytes(shape))

    def _width_for(self, shape: Shape) -> int:
        """The widest of WIDTHS that fits into MAX_BYTES, with the largest vocabulary and the typical routes."""
        room = MAX_BYTES - 8 * self.max_vocabulary - self.typical_tokens(shape) * _typical_bytes(shape)
        for width in WIDTHS:
            with torch.device("meta"):
                network = self.network_of(shape, self.max_vocabulary + 1, width)
            if 2 * sum(parameter.numel() for parameter in network.parameters()) <= room:
                return width
        return WIDTHS[-1]


def _typical_bytes(shape: Shape) -> int:
    """What the typical route of a token takes: the experts, the token's id, and a place."""
    return shape.layers * shape.top_k * (1 if shape.experts <= 256 else 2) + 2 * 8
