"""Where a predictor is wrong: the share of true experts that are among its first K, by what distinguishes tokens and experts.

    python -m benchmarks.prediction_errors RUN TRACE [--part test] [--csv FILE]

Groups are of the first hop: for next-layer, the next layer. The shuffled control is the same predictor, scored against the
experts of other tokens of the same layer.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from profiler.trace.reader import Trace
from speculation.data.repeats import RUN_LENGTHS
from speculation.data.routes import Routes, load_routes
from speculation.data.tasks import targets
from speculation.evaluation.evaluate import predictions, shuffled
from speculation.evaluation.metrics import true_ranks
from speculation.predictors.base import Predictor
from speculation.training.runs import load_run

QUANTILES = 5


@dataclass(frozen=True)
class Hits:
    """Whether each true expert was predicted, for T tokens, L layers, and the K experts in the order of their weights.

    Attributes:
        hits_TLK: Whether the expert is among the K most likely ones.
        control_TLK: The same for the experts of other tokens.
        is_valid_TL: Whether there is a prediction.
    """

    hits_TLK: npt.NDArray[np.bool_]
    control_TLK: npt.NDArray[np.bool_]
    is_valid_TL: npt.NDArray[np.bool_]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--part", default="test", choices=("train", "validation", "test", "all"))
    parser.add_argument("--csv", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    predictor = load_run(arguments.run).predictor
    trace = Trace.open(arguments.trace)
    routes = load_routes(trace, arguments.part, router_inputs=predictor.takes_router_inputs)
    hits = hits_of(predictor, routes)
    found = rows(hits, routes, has_weights=trace.metadata.record.weights)
    table = pl.DataFrame(list(found), schema=["group", "value", "share", "recall", "control"], orient="row")
    with pl.Config(tbl_rows=-1, tbl_hide_dataframe_shape=True, tbl_hide_column_data_types=True, float_precision=3):
        print(table)
    if arguments.csv:
        table.write_csv(arguments.csv)


def hits_of(predictor: Predictor, routes: Routes) -> Hits:
    """Predict every token of `routes`."""
    shape = predictor.shape
    found: list[tuple[npt.NDArray[np.bool_], ...]] = []
    control = shuffled(routes, seed=0)
    for tokens_T, probabilities_TLHE in predictions(predictor, routes):
        scores_NE = probabilities_TLHE[:, :, 0].reshape(-1, shape.experts)
        true, other = (targets(each, shape, tokens_T, 1) for each in (routes, control))
        ranks = [true_ranks(scores_NE, ids.reshape(-1, shape.top_k)) for ids in (true.ids_TLK, other.ids_TLK)]
        hits_TLK, control_TLK = ((each < shape.top_k).reshape(true.ids_TLK.shape) for each in ranks)
        found.append((hits_TLK, control_TLK, true.is_valid_TL))
    return Hits(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


def rows(hits: Hits, routes: Routes, *, has_weights: bool) -> Iterator[tuple[str, str, float, float, float]]:
    """Group, value, the share of predictions in it, recall@K, and that of the control.

    has_weights: Whether the routing weights were recorded: without them, the order of a token's experts means nothing.
    """
    tokens_T = np.arange(len(routes))
    yield row("all", "", hits, np.ones(len(routes), dtype=np.bool_))
    for rank in range(hits.hits_TLK.shape[2] if has_weights else 0):
        of_rank = Hits(hits.hits_TLK[:, :, rank : rank + 1], hits.control_TLK[:, :, rank : rank + 1], hits.is_valid_TL)
        group, value, _, recall, control = row("rank of the true expert by weight", str(rank + 1), of_rank, tokens_T >= 0)
        yield group, value, 1 / hits.hits_TLK.shape[2], recall, control
    longest_T = np.array([0, *RUN_LENGTHS])[routes.matches.order_T]
    for length, longer in zip((0, *RUN_LENGTHS), (*RUN_LENGTHS, 0), strict=True):
        # Runs of other lengths than RUN_LENGTHS count as the next shorter one.
        value = f"{length} or more" if not longer else f"{length}" if longer == length + 1 else f"{length} to {longer - 1}"
        yield row("last tokens that occurred before in the text", value, hits, longest_T == length)
    common_T = common_with_last(routes)
    is_known_T = routes.previous_T >= 0
    edges = np.quantile(common_T[is_known_T], np.linspace(0, 1, QUANTILES + 1))
    for part, (low, high) in enumerate(pairwise(edges)):
        is_in_T = is_known_T & (common_T >= low) & ((common_T < high) | (part == QUANTILES - 1))
        yield row("experts in common with the last token", f"{low:.2f} to {high:.2f}", hits, is_in_T)


def row(group: str, value: str, hits: Hits, is_in_T: npt.NDArray[np.bool_]) -> tuple[str, str, float, float, float]:
    """Group, value, the share of predictions that are of these tokens, recall@K, and that of the control."""
    is_in_TL = hits.is_valid_TL & is_in_T[:, None]
    share = is_in_TL.sum() / hits.is_valid_TL.sum()
    if not is_in_TL.any():
        return group, value, 0.0, float("nan"), float("nan")
    return group, value, float(share), float(hits.hits_TLK[is_in_TL].mean()), float(hits.control_TLK[is_in_TL].mean())


def common_with_last(routes: Routes) -> npt.NDArray[np.float64]:
    """For each token, the share of its experts that the token before it selected too, over all layers; 0 without one."""
    ids_TLK = routes.expert_ids_TLK
    last_TLK = ids_TLK[np.maximum(routes.previous_T, 0)]
    share_T = (ids_TLK[..., None] == last_TLK[..., None, :]).any(-1).mean((1, 2))
    return np.where(routes.previous_T >= 0, share_T, 0.0)


if __name__ == "__main__":
    main()
