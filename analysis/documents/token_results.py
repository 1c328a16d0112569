"""Results token by token, of a sample of problems: what a predictor predicted, and what a simulated cache did.

Tokens are written as short texts, because a list of lists of numbers would take ten times as much space.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

# A sample holds so many problems at most, and so many tokens of each.
SAMPLED_PROBLEMS, SAMPLED_TOKENS = 24, 256
HIT, LATE, DEMAND = 1, 2, 3
_LETTERS = np.array(list("-hld"))
_NOTHING = "-"

Digest = Annotated[int, Field(ge=0, lt=1 << 64)]
Positions = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(max_length=SAMPLED_TOKENS)]
PredictedToken = Annotated[str, StringConstraints(pattern=r"^(-|\d{1,5}(,\d{1,5})*)( (-|\d{1,5}(,\d{1,5})*))*$")]
CachedToken = Annotated[str, StringConstraints(pattern=r"^[-hld]+( [-hld]+)*$")]


class _Rows(BaseModel):
    model_config = ConfigDict(extra="forbid")

    digest: Digest
    token_ids: Positions

    def _check(self, rows: list[str]) -> None:
        if len(rows) != len(self.token_ids):
            raise ValueError(f"{len(rows)} rows for {len(self.token_ids)} tokens")


class PredictedProblem(_Rows):
    """The experts that were predicted for some tokens of a problem.

    digest: identifies the problem by its prompt, in any trace. token_ids: the tokens' positions. experts: a text for each
    token. A space separates MoE layers and a comma the K experts, the most probable first; `-` is a layer for which nothing
    was predicted.

    Example:
        >>> PredictedProblem(digest=7, token_ids=[4], experts=["- 3,1 0,2"]).predicted(layers=3, top_k=2, num_experts=4)[0, 1]
        array([3, 1])
    """

    experts: list[PredictedToken]

    @model_validator(mode="after")
    def _has_all_tokens(self) -> PredictedProblem:
        self._check(self.experts)
        return self

    @classmethod
    def of(
        cls, digest: int, token_ids_T: npt.NDArray[Any], ids_TLK: npt.NDArray[Any], is_known_TL: npt.NDArray[np.bool_]
    ) -> PredictedProblem:
        """From arrays: positions `[T]`, predicted experts `[T, L, K]`, and where there are any `[T, L]`."""
        experts = [
            " ".join(
                ",".join(map(str, ids_K)) if is_known else _NOTHING for ids_K, is_known in zip(ids_LK, is_known_L, strict=True)
            )
            for ids_LK, is_known_L in zip(ids_TLK.tolist(), is_known_TL.tolist(), strict=True)
        ]
        return cls(digest=digest, token_ids=token_ids_T.tolist(), experts=experts)

    def predicted(self, *, layers: int, top_k: int, num_experts: int) -> npt.NDArray[np.int64] | None:
        """The predicted experts `[T, L, K]`, `num_experts` where nothing was predicted; None for a model of other sizes."""
        ids_TLK = np.full((len(self.experts), layers, top_k), num_experts, dtype=np.int64)
        for token, text in enumerate(self.experts):
            cells = text.split(" ")
            if len(cells) != layers:
                return None
            for layer, cell in enumerate(cells):
                if cell != _NOTHING:
                    ids = [int(each) for each in cell.split(",")]
                    if len(ids) != top_k or max(ids) >= num_experts:
                        return None
                    ids_TLK[token, layer] = ids
        return ids_TLK


class CachedProblem(_Rows):
    """What a simulated cache did for the experts of some tokens of a problem.

    digest, token_ids: as in `PredictedProblem`. experts: a text for each token. A space separates MoE layers, and each layer
    has a letter for each of the K experts in the order of the trace: `h` it was in the cache (hit), `l` its prefetch was late,
    `d` it was demand-loaded, or computed on the host; `-` unknown.

    Example:
        >>> CachedProblem(digest=7, token_ids=[4], experts=["hd ll"]).outcomes(layers=2, top_k=2)
        array([[[1, 3],
                [2, 2]]], dtype=uint8)
    """

    experts: list[CachedToken]

    @model_validator(mode="after")
    def _has_all_tokens(self) -> CachedProblem:
        self._check(self.experts)
        return self

    @classmethod
    def of(cls, digest: int, token_ids_T: npt.NDArray[Any], outcomes_TLK: npt.NDArray[Any]) -> CachedProblem:
        """From arrays: positions `[T]`, and `HIT`, `LATE`, `DEMAND` or 0 for each expert `[T, L, K]`."""
        letters_TLK = _LETTERS[outcomes_TLK]
        experts = [" ".join("".join(cell_K) for cell_K in letters_LK) for letters_LK in letters_TLK.tolist()]
        return cls(digest=digest, token_ids=token_ids_T.tolist(), experts=experts)

    def outcomes(self, *, layers: int, top_k: int) -> npt.NDArray[np.uint8] | None:
        """`HIT`, `LATE`, `DEMAND` or 0 for each expert `[T, L, K]`; None for a model of other sizes."""
        cells = [text.split(" ") for text in self.experts]
        if any(len(each) != layers or any(len(cell) != top_k for cell in each) for each in cells):
            return None
        letters_N = np.array([letter for each in cells for cell in each for letter in cell], dtype="<U1")
        codes_N = np.zeros(len(letters_N), dtype=np.uint8)
        for code, letter in enumerate(_LETTERS.tolist()):
            codes_N[letters_N == letter] = code
        return codes_N.reshape(len(cells), layers, top_k)


class SimulatedSample(BaseModel):
    """The simulation whose outcomes are listed token by token: one row of `Simulation.rows`, of the first device."""

    model_config = ConfigDict(extra="forbid")

    device: str | None
    capacity: int = Field(ge=0)
    share: float = Field(ge=0, le=1)
    policy: str
    prefetch: str
    problems: list[CachedProblem] = Field(max_length=SAMPLED_PROBLEMS)
