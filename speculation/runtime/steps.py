"""What a model's forward pass computes: which tokens of which sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch


@dataclass(frozen=True)
class ForwardPass:
    """One forward pass over `[B, T]` tokens.

    Attributes:
        token_ids_BT: The tokens, int64.
        is_real_BT: False where a position is padding, or belongs to a sequence that has finished.
        is_computed_BT: False where a sequence has finished: its experts are not computed. Those of padding are, as without
            offloading, because GEMMs of other sizes round differently.
        is_decode: Whether each sequence continues with one token.
        is_new: Whether the sequences start here.
    """

    token_ids_BT: npt.NDArray[np.int64]
    is_real_BT: npt.NDArray[np.bool_]
    is_computed_BT: npt.NDArray[np.bool_]
    is_decode: bool
    is_new: bool

    @property
    def rows(self) -> list[int]:
        """The sequences that have a token here."""
        return [int(row) for row in np.flatnonzero(self.is_real_BT.any(axis=1))]


def step_of(arguments: dict[str, Any], finished_B: npt.NDArray[np.bool_] | None = None, prompt: int = 1) -> ForwardPass:
    """The step that a model computes, from the arguments of its forward pass.

    Args:
        arguments: Keyword arguments of `forward`: `input_ids` `[B, T]`, and optionally `attention_mask` `[B, S]` and
            `past_key_values`.
        finished_B: The sequences that have finished; None if none has.
        prompt: The length of the prompts, padding included, which may be computed in parts.
    """
    ids_BT = _numpy(arguments["input_ids"])
    batch, tokens = ids_BT.shape
    cache = arguments.get("past_key_values")
    past = 0 if cache is None else int(cache.get_seq_length())
    mask = arguments.get("attention_mask")
    is_real_BT = np.ones((batch, tokens), dtype=np.bool_)
    if isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.shape[1] >= past + tokens:
        is_real_BT = _numpy(mask)[:, past : past + tokens].astype(np.bool_)
    is_computed_BT = np.ones_like(is_real_BT)
    if finished_B is not None and past >= prompt and len(finished_B) == batch:
        is_computed_BT &= ~finished_B[:, None]
    return ForwardPass(
        ids_BT, is_real_BT & is_computed_BT, is_computed_BT, is_decode=past >= prompt and tokens == 1, is_new=not past
    )


def _numpy(tensor: torch.Tensor) -> npt.NDArray[Any]:
    return tensor.detach().cpu().numpy()
