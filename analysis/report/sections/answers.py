"""The section that shows single answers token by token: their experts, what was predicted, and what a cache did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt

from analysis.counts.answers import WINDOW, Answer
from analysis.documents.evaluation import Evaluation
from analysis.documents.simulation import Simulation
from analysis.documents.token_results import CachedProblem, PredictedProblem
from analysis.report.figures import Section, packed
from analysis.statistics.compute import Statistics
from profiler.errors import counted

# Packed arrays of all answers: a page is to stay below 10 MB, and Plotly and the transition matrices take 7.5 of them.
MAX_TEXT = 1_200_000
# Problems that a page is to have room for, however large the model, and tokens of each at least.
PROBLEMS, FEWEST_TOKENS = 24, 32
# Of several evaluations and simulations, the first ones are shown.
MAX_OVERLAYS = 3
PREDICTION, CACHE = "prediction", "cache"


@dataclass(frozen=True)
class _Overlay:
    """Results to show token by token: the rows of each problem, by the digest of its prompt."""

    kind: str
    name: str
    problems: dict[int, PredictedProblem] | dict[int, CachedProblem]


@dataclass(frozen=True)
class ShownAnswer:
    """An answer with the text of each of its tokens, from `labels.sequence_texts`."""

    answer: Answer
    texts: Sequence[str]


def wanted_problems(evaluations: Sequence[Evaluation], simulations: Sequence[Simulation]) -> list[int]:
    """Digests of the problems that evaluations and simulations have results of, token by token."""
    return list(dict.fromkeys(digest for overlay in _overlays(evaluations, simulations) for digest in overlay.problems))


def window_for(layers: int, num_experts: int, top_k: int) -> int:
    """How many tokens of each problem fit, if a page is to show `PROBLEMS` problems."""
    # Ids and weights compress to some 70 %, and base64 makes them a third longer.
    bytes_per_token = layers * top_k * (2 + (num_experts > 255)) * 0.95
    return int(np.clip(MAX_TEXT / PROBLEMS / bytes_per_token, FEWEST_TOKENS, WINDOW))


def answers_section(
    s: Statistics,
    answers: Sequence[ShownAnswer],
    evaluations: Sequence[Evaluation],
    simulations: Sequence[Simulation],
) -> Section:
    """As many of the answers as fit into the page."""
    overlays = _overlays(evaluations, simulations)
    weight_max = max((_largest(each.answer.weights_TLK) for each in answers), default=0.0)
    margin_max = max((_largest(each.answer.margins_TL) for each in answers), default=0.0)
    problems: list[dict[str, Any]] = []
    room = MAX_TEXT
    for answer, tokens in ((each.answer, each.texts) for each in answers):
        results = [_results(overlay, answer, s) for overlay in overlays]
        text = packed(np.concatenate(_arrays(answer, s, results, weight_max, margin_max)))
        room -= len(text)
        if room < 0 and problems:
            break
        problems.append(
            {
                "domain": answer.domain,
                "prompt": answer.prompt,
                "tokens": list(tokens),
                "positions": answer.token_ids_T.tolist(),
                # Index of the first generated token; the number of tokens if there is none.
                "generated": int(answer.is_decode_T.argmax()) if answer.is_decode_T.any() else len(tokens),
                "recorded": answer.recorded,
                "marks": [result is not None for result in results],
                "data": text,
            }
        )
    knows = s.axes.knows_strongest
    repeats_L = s.repetitions[0].first[0] if knows else s.repetitions[0].shared[0]
    start = int(np.nanargmax(repeats_L)) if np.isfinite(repeats_L).any() else s.axes.layers // 2
    data = {
        "layers": list(s.axes.moe_layers),
        "experts": s.axes.num_experts,
        "k": s.axes.top_k,
        "wide": s.axes.num_experts > 255,
        "knowsStrongest": knows,
        "weightMax": weight_max,
        "marginMax": margin_max,
        "start": start,
        "first": _first(problems),
        "ranks": packed(_ranks(s).astype("<u2").view(np.uint8)),
        "overlays": [{"kind": overlay.kind, "name": overlay.name} for overlay in overlays],
        "problems": problems,
    }
    domains = len({problem["domain"] for problem in problems})
    headline = (
        f"{len(problems)} of {counted(s.problems, 'problem')}, from {counted(domains, 'dataset')}: the experts of each token "
        f"at each of {counted(s.axes.layers, 'MoE layer')}."
    )
    window = window_for(s.axes.layers, s.axes.num_experts, s.axes.top_k)
    explanation = (
        "Problems are taken in turn from each dataset, those with results of an evaluation or simulation first; of long "
        f"problems, {window} tokens around the beginning of the answer are shown. Each layer has colors of its own, given to "
        "its experts by their load in the whole trace, the busiest first. Numbers of experts, and so their colors, mean "
        "nothing across layers. The margin is the K-th largest router logit minus the next."
    )
    if any(overlay.kind == PREDICTION for overlay in overlays):
        explanation += " Right: the expert is among the K most probable ones of the prediction."
    if any(overlay.kind == CACHE for overlay in overlays):
        explanation += (
            " Hit: in the cache when the router chose it; late: its prefetch was still in transfer; demand-loaded: neither, so "
            "that it was loaded, or computed on the host. The tokens of a prompt are computed together, and requests of a step "
            "that share an expert share its outcome."
        )
    return Section(
        "One answer, token by token",
        headline,
        explanation,
        kind="answers",
        data=data,
        controls=_controls(s, overlays),
    )


def _first(problems: list[dict[str, Any]]) -> int:
    """The problem that is shown at first: of those with most results, the one with the longest answer."""
    places = range(len(problems))
    return max(
        places, key=lambda n: (sum(problems[n]["marks"]), len(problems[n]["tokens"]) - problems[n]["generated"]), default=0
    )


def _largest(array: npt.NDArray[np.float64] | None) -> float:
    """The largest finite value, 0 if there is none."""
    return 0.0 if array is None or not np.isfinite(array).any() else float(array[np.isfinite(array)].max())


def _overlays(evaluations: Sequence[Evaluation], simulations: Sequence[Simulation]) -> list[_Overlay]:
    found = [
        _Overlay(PREDICTION, f"{each.predictor}, {each.task}", {problem.digest: problem for problem in each.sample})
        for each in evaluations
        if each.sample
    ]
    found += [
        _Overlay(
            CACHE,
            f"{sample.share:.0%} of experts, {sample.policy}, prefetching by {sample.prefetch}",
            {problem.digest: problem for problem in sample.problems},
        )
        for sample in (each.sample for each in simulations)
        if sample is not None
    ]
    return found[:MAX_OVERLAYS]


def _results(overlay: _Overlay, answer: Answer, s: Statistics) -> npt.NDArray[np.int64] | None:
    """The overlay's results for an answer's tokens `[T, L, K]`: predicted experts (E for none), or outcomes (0 for none)."""
    problem = overlay.problems.get(answer.digest)
    if problem is None:
        return None
    layers, top_k, experts = s.axes.layers, s.axes.top_k, s.axes.num_experts
    rows: npt.NDArray[Any] | None
    if isinstance(problem, PredictedProblem):
        rows, nothing = problem.predicted(layers=layers, top_k=top_k, num_experts=experts), experts
    else:
        rows, nothing = problem.outcomes(layers=layers, top_k=top_k), 0
    if rows is None:
        return None
    found_TLK = np.full((len(answer.token_ids_T), layers, top_k), nothing, dtype=np.int64)
    row_of = {position: row for row, position in enumerate(problem.token_ids)}
    pairs = [(token, row_of[position]) for token, position in enumerate(answer.token_ids_T.tolist()) if position in row_of]
    if not pairs:
        return None
    tokens, places = np.array(pairs).T
    found_TLK[tokens] = rows[places]
    return found_TLK


def _arrays(
    answer: Answer, s: Statistics, results: list[npt.NDArray[np.int64] | None], weight_max: float, margin_max: float
) -> list[npt.NDArray[np.uint8]]:
    """What the page's script unpacks: ids, weights, margins and results, each flat, in this order.

    Weights are stored in 255 steps up to `weight_max`, and margins as 255 times the square root of their share of `margin_max`.
    """
    kind = "<u2" if s.axes.num_experts > 255 else "u1"
    arrays = [answer.expert_ids_TLK.astype(kind).view(np.uint8)]
    if weight_max > 0:
        weights = np.zeros(answer.expert_ids_TLK.shape) if answer.weights_TLK is None else np.nan_to_num(answer.weights_TLK)
        arrays.append(np.rint(255 * np.clip(weights / weight_max, 0, 1)).astype(np.uint8))
    if margin_max > 0:
        margins = np.zeros(answer.expert_ids_TLK.shape[:2]) if answer.margins_TL is None else np.nan_to_num(answer.margins_TL)
        arrays.append(np.rint(255 * np.sqrt(np.clip(margins / margin_max, 0, 1))).astype(np.uint8))
    arrays += [result.astype(kind).view(np.uint8) for result in results if result is not None]
    return [array.reshape(-1) for array in arrays]


def _ranks(s: Statistics) -> npt.NDArray[np.int64]:
    """The place of each expert in the order of its layer's load, `[L, E]`, 0 for the busiest."""
    order_LE = np.argsort(-s.load.share_LE, axis=1, kind="stable")
    return np.argsort(order_LE, axis=1, kind="stable")


def _controls(s: Statistics, overlays: list[_Overlay]) -> str:
    options = "".join(
        f'<option value="{number}">{escape(name)}</option>'
        for number, name in enumerate(["experts", *(f"{overlay.kind}: {overlay.name}" for overlay in overlays)], start=-1)
    )
    who = "strongest" if s.axes.knows_strongest else "lowest-numbered"
    read = (
        f"the text is colored by each token's {who} expert at the chosen layer, and a row of the matrix shows it at every "
        "layer. Runs of one color are tokens that share an expert. Each layer has colors of its own: expert 3 of one layer has "
        "nothing to do with expert 3 of another. Point at a token or a cell, or tap it, to see all its "
        "experts; click an expert in the legend to see which tokens use it."
    )
    if overlays:
        read += " Choose what to show: the experts, or which of them a predictor or a cache had ready."
    return f"""
<div class="controls answer-controls">
<label>Search<input type="search" id="answer-search" placeholder="dataset or text"></label>
<label class="wide">Problem<select id="answer-problem"></select></label>
<label{" hidden" if not overlays else ""}>Show<select id="answer-show">{options}</select></label>
<label>Layer <output id="answer-layer-name"></output>
<input type="range" id="answer-layer" min="0" max="{s.axes.layers - 1}" value="0"></label>
</div>
<div id="answer-legend" class="legend"></div>
<div id="answer-detail" class="detail" aria-live="polite"></div>
<div class="answer">
<div id="answer-text" class="text" tabindex="0"></div>
<div id="answer-matrix" class="matrix" tabindex="0" role="img"
 aria-label="Experts of each token (rows) at each MoE layer (columns); arrow keys move between cells.">
<div><canvas></canvas></div></div>
</div>
<p class="reading"><b>How to read this:</b> {escape(read)}</p>
"""
