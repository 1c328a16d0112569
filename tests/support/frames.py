"""Synthetic frames for the tests of accumulators, from plain arrays."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np

from analysis.counts.accumulator import Accumulator
from analysis.counts.frames import Frame
from analysis.counts.survey import Axes, TokenKey
from profiler.trace.schema import RoutingChunk, expert_dtype

AnyAccumulator = TypeVar("AnyAccumulator", bound=Accumulator)


def make_axes(
    layers: int,
    experts: int,
    top_k: int,
    *,
    hops: int = 1,
    datasets: tuple[str, ...] = ("synthetic",),
    vocabulary: tuple[TokenKey, ...] = (),
    has_weights: bool = True,
) -> Axes:
    return Axes(tuple(range(layers)), experts, top_k, hops, has_weights, datasets, vocabulary)


def make_frame(
    problems: Sequence[np.ndarray],
    experts: int,
    *,
    weights: Sequence[np.ndarray] | None = None,
    datasets: Sequence[int] | None = None,
    vocab: Sequence[np.ndarray] | None = None,
    folds: Sequence[int] | None = None,
    first_problem: int = 0,
) -> Frame:
    """One frame of whole problems. problems: expert ids `[T, L, K]` each; the first token of each is of the prompt."""
    ids_TLK = np.concatenate([np.asarray(ids) for ids in problems]).astype(expert_dtype(experts + 1))
    lengths = [len(ids) for ids in problems]
    numbers = np.arange(len(problems))
    if weights is None:
        weights_TLK = np.broadcast_to(np.linspace(1, 0.5, ids_TLK.shape[2]), ids_TLK.shape).astype(np.float16)
    else:
        weights_TLK = np.concatenate(weights).astype(np.float16)
    position_T = np.concatenate([np.arange(length) for length in lengths]).astype(np.int32)
    return Frame(
        chunk=RoutingChunk(np.repeat(numbers + first_problem, lengths).astype(np.int32), position_T, ids_TLK, weights_TLK),
        dataset_T=np.repeat(datasets if datasets is not None else np.zeros(len(problems)), lengths).astype(np.int32),
        phase_T=(position_T > 0).astype(np.int32),
        fold_T=np.repeat(folds if folds is not None else numbers % 2, lengths).astype(np.int32),
        vocab_T=np.concatenate(vocab).astype(np.int32) if vocab is not None else np.full(sum(lengths), -1, dtype=np.int32),
    )


def counted(accumulator: AnyAccumulator, frames: Iterable[Frame]) -> AnyAccumulator:
    """The accumulator after all frames of one part."""
    for frame in frames:
        accumulator.update(frame)
    accumulator.close()
    return accumulator


def uniform(random: np.random.Generator, tokens: int, layers: int, experts: int, top_k: int) -> np.ndarray:
    """Independent uniform routing `[T, L, K]`."""
    return random.random((tokens, layers, experts)).argsort(-1)[:, :, :top_k]
