"""Compare a recorded trace with `transformers` on the same tokens, and decide whether differences are ties or errors.

There are two oracles. `transformers`: the model computes everything. `router on recorded inputs`: as before, but each router
gets the input that vLLM recorded, because vLLM computes something before the router in another way. The routers, their weights
and their formula are `transformers`' own in both, and the recorded inputs must belong to the tokens and layers that they are
recorded for.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from profiler.engines.transformers import moe_blocks, route
from profiler.errors import EngineError, TraceError
from profiler.models.moe_modules import MoEBlock
from profiler.trace.reader import Trace

TRANSFORMERS, ROUTER = "transformers", "router on recorded inputs"

# Recorded weights are float16, and engines round differently.
ROUNDED_INPUTS = "float32 on inputs recorded in float16"
WEIGHT_TOLERANCE = {"float32": 2**-12 + 1e-5, ROUNDED_INPUTS: 0.005, "bfloat16": 0.05, "float16": 0.01}
# Two implementations may select different experts if the lowest selected and the highest rejected router logit are this close,
# in standard deviations of the layer's logits. bfloat16 has 8 bits: the widest gap seen on a trained model is 0.024.
TIE_GAP = {"float32": 1e-3, ROUNDED_INPUTS: 5e-3, "bfloat16": 0.08, "float16": 0.02}
# A recorded router input is at its place if it is so many times nearer (in squared distance) to the input of its own token than
# to those of the tokens around, and misplaced if it is so many times nearer to one of these. The shares of rows that may be
# misplaced, and not at their place.
NEARER = 2.0
MISPLACED_SHARE, UNPLACED_SHARE = 0.01, 0.1


@dataclass(frozen=True, kw_only=True)
class OracleAgreement:
    """How far a trace agrees with an oracle (`TRANSFORMERS` or `ROUTER`). A set is the experts of one token at one layer.

    compared, differing: numbers of sets.
    origins: differing sets that no earlier difference explains: no set of the same sequence differs at the same or an earlier
    token and a lower layer. Any other difference may follow from an origin, because its router got a different input. With
    recorded inputs, every difference is an origin.
    widest_gap: over the origins, the largest gap between the lowest selected and the highest rejected score, in standard
    deviations of the layer's scores.
    weight_error: the largest difference between recorded and expected weights, over equal sets; relative for weights above 1
    and, with recorded inputs, to the largest weight of the set. weight_ratio: the median ratio of recorded to expected weights,
    over equal sets.
    missing: number of positions that should have been recorded and were not.
    first: location of the first origin.
    rows, misplaced, unplaced: with recorded inputs, how many rows have other tokens around, how many of them fit one of these
    better than their own, and how many do not clearly fit their own. input_difference: the median distance of recorded inputs
    from those in `transformers`, divided by the latter's length.
    """

    oracle: str
    compared: int
    differing: int
    origins: int
    widest_gap: float
    weight_error: float
    weight_ratio: float
    missing: int
    first: str
    rows: int = 0
    misplaced: int = 0
    unplaced: int = 0
    input_difference: float = 0.0

    def verdict(self, dtype: str) -> tuple[str, str]:
        """The verdict (`exact`, `ties` or `wrong`) and its reason, for an engine that ran in `dtype`."""
        if self.oracle == ROUTER and dtype == "float32":
            dtype = ROUNDED_INPUTS
        if self.missing:
            return "wrong", f"{self.missing} positions were not recorded"
        if not self.compared:
            return "wrong", "nothing was compared"
        if self.oracle == ROUTER and not self.rows:
            return "wrong", "no router inputs were recorded"
        if self.misplaced > MISPLACED_SHARE * self.rows:
            return "wrong", f"{self.misplaced:,} of {self.rows:,} recorded router inputs fit another token better"
        if self.unplaced > UNPLACED_SHARE * self.rows:
            text = f"{self.unplaced:,} of {self.rows:,} recorded router inputs do not clearly fit their own token"
            return "wrong", f"{text} (they differ from transformers' by {self.input_difference:.0%})"
        if self.widest_gap > TIE_GAP[dtype]:
            gap = f"at gaps of up to {self.widest_gap:.3f} standard deviations of the scores"
            return "wrong", f"{self.differing:,} of {self.compared:,} sets differ, {gap}; first: {self.first}"
        if self.differing == self.compared:
            return "wrong", f"all {self.compared:,} sets differ; first: {self.first}"
        if self.weight_error > WEIGHT_TOLERANCE[dtype]:
            return "wrong", f"weights differ by up to {self.weight_error:.4f} (median ratio {self.weight_ratio:.3f})"
        if self.differing:
            gap = f"widest gap {self.widest_gap:.4f}"
            return "ties", f"{self.differing:,} of {self.compared:,} sets differ; all differences start at near ties ({gap})"
        return "exact", f"all {self.compared:,} sets are equal"


def load_oracle(folder: Path, dtype: str = "float32") -> Any:
    """The `transformers` model of a checkpoint, used as the reference. Weights in AWQ's form are unpacked.

    Raises `EngineError` if it does not load all weights.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    from vllm_patch.check.families.awq import is_awq, unpack_awq

    if folder.name == "deepseek_v1":
        from vllm_patch.check.families.deepseek_v1 import deepseek_v1_oracle

        return deepseek_v1_oracle(folder).to(getattr(torch, dtype))
    if is_awq(folder):
        with TemporaryDirectory() as temporary:
            unpack_awq(folder, Path(temporary) / folder.name)
            return load_oracle(Path(temporary) / folder.name, dtype)
    options = {"dtype": getattr(torch, dtype), "output_loading_info": True}
    try:
        model, report = AutoModelForCausalLM.from_pretrained(folder, **options)
    except ValueError:
        model, report = AutoModelForImageTextToText.from_pretrained(folder, **options)
    if report["missing_keys"]:
        raise EngineError(f"transformers finds no weights for {sorted(report['missing_keys'])[0]} in {folder}")
    return model.eval()


def compare_with_checkpoint(
    trace: Path, checkpoint: Path, dtype: str, *, recorded_inputs: bool = False, corrections: bool = True
) -> OracleAgreement:
    """Compare the trace in a folder with the `transformers` model of a checkpoint.

    corrections: false to set the routers' correction biases to zero, for a vLLM that ignores them.
    """
    oracle = load_oracle(checkpoint, dtype)
    for block in [] if corrections else moe_blocks(oracle):
        if block.correction_E is not None:
            block.correction_E.zero_()
    return compare(Trace.open(trace), oracle, recorded_inputs=recorded_inputs)


def compare_in_new_process(
    trace: Path, checkpoint: Path, dtype: str, *, recorded_inputs: bool = False, corrections: bool = True
) -> OracleAgreement:
    """`compare_with_checkpoint` in a process that has not imported vLLM. Raises `EngineError` if it fails."""
    arguments = [str(trace), str(checkpoint), dtype, str(int(recorded_inputs)), str(int(corrections))]
    command = [sys.executable, "-m", "vllm_patch.check.agreement", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "VLLM_PLUGINS": ""})
    if done.returncode:
        raise EngineError(f"the comparison failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return OracleAgreement(**json.loads(done.stdout.splitlines()[-1]))


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


def compare(trace: Trace, oracle: Any, *, recorded_inputs: bool = False) -> OracleAgreement:
    """Compare every recorded set with that of the reference.

    recorded_inputs: give each router the recorded input instead of the model's own. Sequences without recorded inputs at every
    MoE layer are then not compared.
    """
    layers = trace.metadata.model.moe_layers
    top_k = trace.metadata.model.top_k
    cached = dict(zip(*(trace.problems.column(name).to_pylist() for name in ("problem_id", "cached_tokens")), strict=True))
    compared = differing = origins = missing = rows = misplaced = unplaced = 0
    widest, error, first = 0.0, 0.0, ""
    ratios: list[npt.NDArray[np.float64]] = []
    distances: list[npt.NDArray[np.float64]] = []
    for problem, tokens in vocabulary(trace).items():
        if len(tokens) < 2:
            continue
        chunk = trace.arrays(problem)
        missing += max(0, len(tokens) - 1 - (cached[problem] or 0) - len(chunk))
        recorded = _recorded_inputs(trace, problem) if recorded_inputs else {}
        if recorded_inputs and recorded.keys() != set(layers):
            continue
        inputs = _Inputs(chunk.token_ids_T, recorded)
        ids_TLK, weights_TLK = route(oracle, tokens[:-1], inputs.add)
        if recorded:
            place = _places(np.asarray(tokens[:-1]), chunk.token_ids_T, inputs.own, recorded)
            rows, misplaced = rows + place.rows, misplaced + place.misplaced
            unplaced += place.unplaced
            distances.append(place.distance)
        expected_ids, expected_weights = by_expert(ids_TLK[chunk.token_ids_T], weights_TLK[chunk.token_ids_T])
        assert chunk.weights_TLK is not None
        ids, weights = by_expert(chunk.expert_ids_TLK, chunk.weights_TLK)
        differs_TL = (ids != expected_ids).any(-1)
        compared, differing = compared + differs_TL.size, differing + int(differs_TL.sum())
        same_TLK = ~differs_TL[..., None] & np.ones(top_k, dtype=np.bool_)
        if same_TLK.any():
            # Rounding to float16 is relative to the next power of two.
            power_TLK = np.exp2(np.ceil(np.log2(np.maximum(expected_weights, 1))))
            scale_TLK = expected_weights.max(-1, keepdims=True) if recorded else power_TLK
            error = max(error, float((np.abs(weights - expected_weights) / scale_TLK)[same_TLK].max()))
            ratios.append((weights / np.maximum(expected_weights, 1e-9))[same_TLK])
        origin_TL = differs_TL if recorded else differs_TL & ~_has_earlier_difference(differs_TL)
        origins += int(origin_TL.sum())
        if origin_TL.any():
            if not first:
                token, layer = (int(x) for x in np.argwhere(origin_TL)[0])
                first = (
                    f"problem {problem}, token {int(chunk.token_ids_T[token])}, layer {layers[layer]}: recorded "
                    f"{ids[token, layer].tolist()}, expected {expected_ids[token, layer].tolist()}"
                )
            gap_TL = inputs.gaps(oracle, ids_TLK)[chunk.token_ids_T]
            widest = max(widest, float(gap_TL[origin_TL].max()))
    return OracleAgreement(
        oracle=ROUTER if recorded_inputs else TRANSFORMERS,
        compared=compared,
        differing=differing,
        origins=origins,
        widest_gap=widest,
        weight_error=error,
        weight_ratio=float(np.median(np.concatenate(ratios))) if ratios else 0.0,
        missing=missing,
        first=first,
        rows=rows,
        misplaced=misplaced,
        unplaced=unplaced,
        input_difference=float(np.median(np.concatenate(distances, axis=None))) if distances else 0.0,
    )


def _has_earlier_difference(differs_TL: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Whether a set at the same or an earlier token and a lower layer differs `[T, L]`: this router's input differed, too."""
    seen_TL = np.logical_or.accumulate(np.logical_or.accumulate(differs_TL, axis=0), axis=1)
    earlier_TL = np.zeros_like(differs_TL)
    earlier_TL[:, 1:] = seen_TL[:, :-1]
    return earlier_TL


def _recorded_inputs(trace: Trace, problem: int) -> dict[int, npt.NDArray[np.float32]]:
    """Recorded router inputs `[T, D]` of each layer; empty if the sequence has none, or not at every recorded position."""
    try:
        positions, layers, hidden_TLD = trace.values("hidden", problem)
    except TraceError:
        return {}
    if not np.array_equal(positions, trace.arrays(problem).token_ids_T):
        return {}
    return {layer: hidden_TLD[:, i].astype(np.float32) for i, layer in enumerate(layers)}


class _Inputs:
    """Gives routers their recorded inputs, and keeps each MoE layer's own and used inputs `[T, D]`.

    positions_T: the positions of the recorded rows. recorded: layer -> inputs; empty to leave the routers their own.
    """

    def __init__(self, positions_T: npt.NDArray[Any], recorded: dict[int, npt.NDArray[np.float32]]) -> None:
        self._positions_T, self._recorded = positions_T, recorded
        self.own: dict[int, npt.NDArray[np.float32]] = {}
        self._used: list[tuple[MoEBlock, Any]] = []

    def add(self, block: MoEBlock, inputs_TD: Any) -> Any:
        import torch

        self.own[block.layer] = inputs_TD.float().cpu().numpy()
        if block.layer not in self._recorded:
            self._used.append((block, inputs_TD))
            return None
        changed_TD = inputs_TD.clone()
        changed_TD[torch.from_numpy(self._positions_T.astype(np.int64))] = torch.from_numpy(self._recorded[block.layer]).to(
            inputs_TD.dtype
        )
        self._used.append((block, changed_TD))
        return changed_TD

    def gaps(self, model: Any, ids_TLK: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """The gap of every layer's selection `ids_TLK` `[T, L]`; see `_gap`."""
        config = model.config.get_text_config()
        groups, kept = (int(getattr(config, name, None) or 1) for name in ("n_group", "topk_group"))
        return np.stack(
            [_gap(block, inputs, ids_TLK[:, i], groups, kept) for i, (block, inputs) in enumerate(self._used)], axis=1
        )


@dataclass(frozen=True)
class _Places:
    """Numbers of rows as in `OracleAgreement`, and each row's relative distance `[T, L]` from the input in `transformers`."""

    rows: int
    misplaced: int
    unplaced: int
    distance: npt.NDArray[np.float64]


def _places(
    tokens_N: npt.NDArray[Any],
    positions_T: npt.NDArray[Any],
    own: dict[int, npt.NDArray[np.float32]],
    recorded: dict[int, npt.NDArray[np.float32]],
) -> _Places:
    """Compare recorded router inputs with those of the same token, and of other tokens nearby, in `transformers`.

    tokens_N: the sequence's vocabulary ids. positions_T: positions of the recorded rows. own: layer -> inputs `[N, D]`.
    recorded: layer -> inputs `[T, D]`.
    """
    recorded_TLD = np.stack([recorded[layer] for layer in sorted(recorded)], axis=1).astype(np.float64)
    own_NLD = np.stack([own[layer] for layer in sorted(recorded)], axis=1).astype(np.float64)
    at_own_TL = ((recorded_TLD - own_NLD[positions_T]) ** 2).sum(-1)
    nearest_TL = np.full(at_own_TL.shape, np.inf)
    for offset in (-2, -1, 1, 2):
        other_T = np.clip(positions_T + offset, 0, len(tokens_N) - 1)
        differs_T = tokens_N[other_T] != tokens_N[positions_T]
        distance_TL = ((recorded_TLD - own_NLD[other_T]) ** 2).sum(-1)
        nearest_TL = np.where(differs_T[:, None], np.minimum(nearest_TL, distance_TL), nearest_TL)
    length_TL = np.maximum((own_NLD[positions_T] ** 2).sum(-1), 1e-12)
    return _Places(
        rows=int(np.isfinite(nearest_TL).sum()),
        misplaced=int((NEARER * nearest_TL < at_own_TL).sum()),
        unplaced=int((NEARER * at_own_TL > nearest_TL).sum()),
        distance=np.sqrt(at_own_TL / length_TL),
    )


def _gap(block: MoEBlock, inputs_TD: Any, ids_TK: npt.NDArray[Any], groups: int, kept: int) -> npt.NDArray[np.float64]:
    """The gap between the lowest selected and the highest rejected score `[T]`, in standard deviations of the layer's scores.

    Scores are the values by which experts are selected: logits, or their sigmoid or softmax plus a correction bias, whichever
    explains the selection `ids_TK`. If groups of experts are selected first, the gap between groups counts too.
    """
    import torch

    gate: Any = block.gate
    correction = block.correction_E
    with torch.inference_mode():
        bias = None if getattr(gate, "bias", None) is None else gate.bias.float()
        logits_TE = torch.nn.functional.linear(inputs_TD.float(), gate.weight.float(), bias)
        if correction is None:
            return _selection_gap(logits_TE.double().cpu().numpy(), ids_TK, 1, 1)
        candidates = [logits_TE.sigmoid(), logits_TE.softmax(-1)]
        scored = [(score + correction.float()).double().cpu().numpy() for score in candidates]
    gaps = [_selection_gap(score_TE, ids_TK, groups, kept) for score_TE in scored]
    return max(gaps, key=lambda gap_T: int((gap_T >= 0).sum()))


def _selection_gap(
    scores_TE: npt.NDArray[np.float64], ids_TK: npt.NDArray[Any], groups: int, kept: int
) -> npt.NDArray[np.float64]:
    """The gap `[T]` if these scores select `ids_TK`; negative where they would select others."""
    spread = max(float(scores_TE.std()), 1e-9)
    gap_T = np.full(len(scores_TE), np.inf)
    if groups > kept:
        members_TGM = scores_TE.reshape(len(scores_TE), groups, -1)
        best_TG = np.sort(members_TGM, -1)[..., -2:].sum(-1)
        ordered_TG = np.sort(best_TG, -1)
        gap_T = ordered_TG[:, -kept] - ordered_TG[:, -kept - 1]
        rejected_TG = best_TG < ordered_TG[:, -kept][:, None]
        scores_TE = np.where(np.repeat(rejected_TG, members_TGM.shape[-1], axis=1), -1e9, scores_TE)
    if ids_TK.shape[1] < scores_TE.shape[1]:
        selected_TE = np.zeros(scores_TE.shape, dtype=np.bool_)
        np.put_along_axis(selected_TE, ids_TK.astype(np.int64), True, axis=1)
        lowest_T = np.where(selected_TE, scores_TE, np.inf).min(-1)
        highest_T = np.where(selected_TE, -np.inf, scores_TE).max(-1)
        gap_T = np.minimum(gap_T, lowest_T - highest_T)
    return gap_T / spread


if __name__ == "__main__":
    found = compare_with_checkpoint(
        Path(sys.argv[1]),
        Path(sys.argv[2]),
        sys.argv[3],
        recorded_inputs=sys.argv[4] == "1",
        corrections=sys.argv[5] == "1",
    )
    print(json.dumps(asdict(found)))
