"""Compare a recorded trace with `transformers` on the same tokens, and decide whether differences are ties or errors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from profiler.engines.transformers import route
from profiler.trace.reader import Trace

# Recorded weights are float16, below 1 for most routers, and engines round differently.
WEIGHT_TOLERANCE = {"float32": 2**-12 + 1e-5, "bfloat16": 0.05, "float16": 0.01}
# Two implementations may select different experts if the lowest selected and the highest rejected router logit are this close,
# in standard deviations of the layer's logits. bfloat16 has 8 bits: the widest gap seen on a trained model is 0.024.
TIE_GAP = {"float32": 1e-3, "bfloat16": 0.08, "float16": 0.02}


@dataclass(frozen=True, kw_only=True)
class OracleAgreement:
    """How far a trace agrees with `transformers`, the oracle. A set is the experts of one token at one layer.

    compared, differing: numbers of sets.
    origins: differing sets that no earlier difference explains: no set of the same sequence differs at the same or an earlier
    token and a lower layer. Any other difference may follow from an origin, because its router got a different input.
    widest_gap: over the origins, the largest gap between the lowest selected and the highest rejected score, in standard
    deviations of the layer's scores.
    weight_error: the largest difference between recorded and expected weights, over equal sets. weight_ratio: the median ratio
    of recorded to expected weights, over equal sets.
    missing: number of positions that should have been recorded and were not.
    first: location of the first origin.
    """

    compared: int
    differing: int
    origins: int
    widest_gap: float
    weight_error: float
    weight_ratio: float
    missing: int
    first: str

    def verdict(self, dtype: str) -> tuple[str, str]:
        """The verdict (`exact`, `ties` or `wrong`) and its reason, for an engine that ran in `dtype`."""
        tolerance = WEIGHT_TOLERANCE[dtype]
        if self.missing:
            return "wrong", f"{self.missing} positions were not recorded"
        if not self.compared:
            return "wrong", "nothing was compared"
        if self.widest_gap > TIE_GAP[dtype]:
            gap = f"at gaps of up to {self.widest_gap:.3f} standard deviations of the scores"
            return "wrong", f"{self.differing:,} of {self.compared:,} sets differ, {gap}; first: {self.first}"
        if self.differing == self.compared:
            return "wrong", f"all {self.compared:,} sets differ; first: {self.first}"
        if self.weight_error > tolerance:
            return "wrong", f"weights differ by up to {self.weight_error:.4f} (median ratio {self.weight_ratio:.3f})"
        if self.differing:
            gap = f"widest gap {self.widest_gap:.4f}"
            return "ties", f"{self.differing:,} of {self.compared:,} sets differ; all differences start at near ties ({gap})"
        return "exact", f"all {self.compared:,} sets are equal"


def load_oracle(folder: Path, dtype: str = "float32") -> Any:
    """The `transformers` model of a checkpoint, used as the reference."""
    import torch
    from transformers import AutoModelForCausalLM

    if folder.name == "deepseek_v1":
        from vllm_patch.check.families import deepseek_v1_oracle

        return deepseek_v1_oracle(folder).to(getattr(torch, dtype))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()


def vocabulary(trace: Trace) -> dict[int, list[int]]:
    """Vocabulary ids of every problem, prompt and output."""
    table = trace.tokens.to_pydict()
    tokens: dict[int, list[int]] = {}
    for problem, vocab in zip(table["problem_id"], table["vocab_id"], strict=True):
        tokens.setdefault(problem, []).append(vocab)
    return tokens


def by_expert(ids_TLK: npt.NDArray[Any], weights_TLK: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64]]:
    """The (id, weight) pairs of each set, sorted by expert id."""
    order = np.argsort(ids_TLK, -1)
    return np.take_along_axis(ids_TLK, order, -1), np.take_along_axis(weights_TLK.astype(np.float64), order, -1)


def compare(trace: Trace, oracle: Any) -> OracleAgreement:
    """Compare every recorded set with that of the reference."""
    layers = trace.metadata.model.moe_layers
    top_k = trace.metadata.model.top_k
    cached = dict(zip(*(trace.problems.column(name).to_pylist() for name in ("problem_id", "cached_tokens")), strict=True))
    compared = differing = origins = missing = 0
    widest, error, first = 0.0, 0.0, ""
    ratios: list[npt.NDArray[np.float64]] = []
    for problem, tokens in vocabulary(trace).items():
        if len(tokens) < 2:
            continue
        chunk = trace.arrays(problem)
        expected_positions = len(tokens) - 1 - (cached[problem] or 0)
        missing += max(0, expected_positions - len(chunk))
        scores = _Scores(oracle, top_k)
        ids_TLK, weights_TLK = route(oracle, tokens[:-1], scores.add)
        expected_ids, expected_weights = by_expert(ids_TLK[chunk.token_ids_T], weights_TLK[chunk.token_ids_T])
        assert chunk.weights_TLK is not None
        ids, weights = by_expert(chunk.expert_ids_TLK, chunk.weights_TLK)
        differs_TL = (ids != expected_ids).any(-1)
        compared, differing = compared + differs_TL.size, differing + int(differs_TL.sum())
        same_TLK = ~differs_TL[..., None] & np.ones(top_k, dtype=np.bool_)
        if same_TLK.any():
            error = max(error, float(np.abs(weights - expected_weights)[same_TLK].max()))
            ratios.append((weights / np.maximum(expected_weights, 1e-9))[same_TLK])
        origin_TL = differs_TL & ~_has_earlier_difference(differs_TL)
        origins += int(origin_TL.sum())
        if origin_TL.any():
            if not first:
                token, layer = (int(x) for x in np.argwhere(origin_TL)[0])
                first = (
                    f"problem {problem}, token {int(chunk.token_ids_T[token])}, layer {layers[layer]}: recorded "
                    f"{ids[token, layer].tolist()}, expected {expected_ids[token, layer].tolist()}"
                )
            gap_TL = np.stack(scores.gaps, axis=1)[chunk.token_ids_T]
            widest = max(widest, float(gap_TL[origin_TL].max()))
    return OracleAgreement(
        compared=compared,
        differing=differing,
        origins=origins,
        widest_gap=widest,
        weight_error=error,
        weight_ratio=float(np.median(np.concatenate(ratios))) if ratios else 0.0,
        missing=missing,
        first=first,
    )


def _has_earlier_difference(differs_TL: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Whether a set at the same or an earlier token and a lower layer differs `[T, L]`: this router's input differed, too."""
    seen_TL = np.logical_or.accumulate(np.logical_or.accumulate(differs_TL, axis=0), axis=1)
    earlier_TL = np.zeros_like(differs_TL)
    earlier_TL[:, 1:] = seen_TL[:, :-1]
    return earlier_TL


class _Scores:
    """Receives the routers' inputs layer by layer, and keeps each layer's gaps `[T]`."""

    def __init__(self, model: Any, top_k: int) -> None:
        self._model, self._top_k = model, top_k
        self.gaps: list[npt.NDArray[np.float64]] = []

    def add(self, router: Any, inputs: Any) -> None:
        self.gaps.append(_gap(self._model, router, inputs, self._top_k))


def _gap(model: Any, router: Any, inputs: Any, top_k: int) -> npt.NDArray[np.float64]:
    """The gap between the lowest selected and the highest rejected score `[T]`, in standard deviations of the layer's scores.

    Scores are the values by which experts are selected: logits, or their sigmoid plus a correction bias. If groups of experts
    are selected first, the gap between groups counts too.
    """
    import torch

    logits_TE = torch.nn.functional.linear(inputs.float(), router.weight.float())
    bias = getattr(router, "bias", None)
    if bias is not None:
        logits_TE = logits_TE + bias.float()
    scores_TE = logits_TE.double().cpu().numpy()
    correction = getattr(router, "e_score_correction_bias", None)
    if correction is not None:
        scores_TE = 1 / (1 + np.exp(-scores_TE)) + correction.double().cpu().numpy()
    spread = max(float(scores_TE.std()), 1e-9)
    groups, kept = (int(getattr(model.config, name, None) or 1) for name in ("n_group", "topk_group"))
    gap_T = np.full(len(scores_TE), np.inf)
    if correction is not None and groups > kept:
        members_TGM = scores_TE.reshape(len(scores_TE), groups, -1)
        best_TG = np.sort(members_TGM, -1)[..., -2:].sum(-1)
        gap_T = _top_k_gap(best_TG, kept)
        rejected_TG = best_TG < np.sort(best_TG, -1)[:, -kept][:, None]
        scores_TE = np.where(np.repeat(rejected_TG, members_TGM.shape[-1], axis=1), -1e9, scores_TE)
    if top_k < scores_TE.shape[1]:
        gap_T = np.minimum(gap_T, _top_k_gap(scores_TE, top_k))
    return gap_T / spread


def _top_k_gap(scores_TE: npt.NDArray[np.float64], top_k: int) -> npt.NDArray[np.float64]:
    """The K-th largest score minus the next one `[T]`."""
    ordered = np.sort(scores_TE, -1)
    difference: npt.NDArray[np.float64] = ordered[:, -top_k] - ordered[:, -top_k - 1]
    return difference
