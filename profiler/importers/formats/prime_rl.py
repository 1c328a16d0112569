"""Import prime-rl's training batches with router replay: MessagePack, `rollouts.bin` in a folder for each step.

A batch is a list whose first entry is the list of samples, and a sample a list of its fields by position, which differ between
releases. Its routes are the entry `[data, [T, L, K], dtype]` (github.com/PrimeIntellect-ai/prime-rl,
src/prime_rl/transport/types.py, `RoutedExperts` and `TrainingSample`, 2026). Its tokens are the first entry, with a mask of
those that the model generated in the second one, or, in earlier releases, prompt and its mask, then completion and its mask.

There are no weights. Layers are counted as vLLM returned them: decoder layers, or MoE layers only, which the file does not
show. Dense layers are all 0 or -1. Samples are padded with zeros at their end.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from profiler.errors import UNREADABLE, TraceError, counted, first_line
from profiler.importers import msgpack
from profiler.importers.reading import files_of, integer_array, sources_of
from profiler.importers.rows import EMPTY, MAX_LAYER, layers_with_experts
from profiler.importers.target import Target
from profiler.trace.schema import DECODE, MAX_TOP_K, PREFILL

NAME = "prime-rl"
ABOUT = "prime-rl training batches with routed experts: rollouts.bin, or a folder of step folders; no weights"
KINDS = ("file", "folder")
PATTERNS = ("rollouts.bin", "step_*/rollouts.bin")

DTYPES = ("uint8", "uint16", "int16", "int32")


def detect(source: Path) -> bool:
    files = files_of(source, *PATTERNS)
    if not files:
        return False
    with files[0].open("rb") as file:
        start = file.read(6)
    # A list, whose first entry is a list of lists.
    return len(start) == 6 and _is_list(start[0]) and _is_list(start[1]) and any(map(_is_list, start[2:]))


def _is_list(first: int) -> bool:
    return 0x91 <= first <= 0x9F or first in {0xDC, 0xDD}


def read(source: Path, target: Target) -> None:
    target.gaps.append("layers are numbered as in the arrays, which have all decoder layers or those with experts only")
    files = sources_of(source, *PATTERNS)
    # Dense layers can be recognized only once all files are read: every file is read twice.
    routes = (_routes(sample, where) for path in files for where, sample in _samples(path) if _has_routes(sample))
    moe_layers, gaps = layers_with_experts(routes, source)
    target.gaps += gaps
    without = 0
    for path in files:
        name = (path.parent.name,) if len(files) > 1 else ()
        for number, (where, sample) in enumerate(_samples(path)):
            if _has_routes(sample):
                _add(sample, target.problem("prime-rl", *name, str(number)), moe_layers, where, target)
            else:
                without += 1
    if without:
        target.gaps.append(f"{counted(without, 'sample')} left out: no routed experts")


def _samples(path: Path) -> Iterator[tuple[str, list[Any]]]:
    """The samples of a file, one in memory at a time, each with its place as text for messages."""
    try:
        with path.open("rb") as file:
            for number, sample in enumerate(msgpack.entries_of_first(file)):
                if not isinstance(sample, list):
                    raise TraceError(f"{path}: expected a list that begins with the list of samples")
                yield f"{path}, sample {number}", sample
    except UNREADABLE as error:
        raise TraceError(f"{path} is not MessagePack: {first_line(error)}") from error


def _has_routes(sample: list[Any]) -> bool:
    return any(map(_is_routes, sample))


def _is_routes(value: object) -> bool:
    return isinstance(value, list) and len(value) == 3 and isinstance(value[0], bytes) and value[2] in DTYPES


def _routes(sample: list[Any], where: str) -> npt.NDArray[Any]:
    """The expert ids `[T, L, K]` of a sample. Raises `TraceError`, naming `where`, if shape and data do not agree."""
    data, shape, dtype = next(value for value in sample if _is_routes(value))
    tokens, layers, top_k = (
        integer_array(shape, f"{where}: shape").tolist() if isinstance(shape, list) and len(shape) == 3 else (0, 0, 0)
    )
    if (
        not 1 <= layers <= MAX_LAYER
        or not 1 <= top_k <= MAX_TOP_K
        or tokens * layers * top_k * np.dtype(dtype).itemsize != len(data)
    ):
        raise TraceError(f"{where}: {len(data):,} bytes of {dtype}, which is not a shape [T, L, K] of {shape!r}")
    return np.frombuffer(data, dtype=np.dtype(dtype).newbyteorder("<")).reshape(tokens, layers, top_k)


def _add(sample: list[Any], problem_id: int, layers: list[int], where: str, target: Target) -> None:
    ids_TLK = _routes(sample, where)
    if ids_TLK.shape[1] <= layers[-1]:
        raise TraceError(f"{where}: {counted(ids_TLK.shape[1], 'layer')}, but other samples have more")
    vocab_ids_T, is_decode_T = _tokens(sample, where)
    # The last token is never fed back: its row is padding. Zeros before the last other route are expert 0.
    others = np.flatnonzero((ids_TLK[: max(len(vocab_ids_T) - 1, 0)] > 0).any((1, 2)))
    routed = int(others[-1]) + 1 if len(others) else 0
    ids_TLK = np.maximum(ids_TLK[:routed].astype(np.int32), EMPTY)[:, layers]
    present_T = (ids_TLK != EMPTY).any((1, 2))
    target.add_arrays(problem_id, np.flatnonzero(present_T), layers, ids_TLK[present_T], None, where)
    for phase, mine_T in ((PREFILL, ~is_decode_T), (DECODE, is_decode_T)):
        if mine_T.any():
            target.add_tokens(problem_id, np.flatnonzero(mine_T), phase, vocab_ids_T=vocab_ids_T[mine_T])


def _tokens(sample: list[Any], where: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Vocabulary ids of a sample's tokens, and which were generated, `[T]`."""
    first, mask = (integer_array(sample[0], f"{where}: tokens"), sample[1]) if len(sample) > 1 else (None, None)
    if first is None or not _is_mask(mask, len(first)):
        raise TraceError(f"{where}: expected token ids and a mask of the same length as its first entries")
    if len(sample) > 3 and isinstance(sample[2], list) and _is_mask(sample[3], len(sample[2])) and len(sample[2]):
        completion = integer_array(sample[2], f"{where}: completion")
        return np.concatenate([first, completion]), np.repeat([False, True], [len(first), len(completion)])
    return first, np.array(mask, dtype=np.bool_)


def _is_mask(value: object, length: int) -> bool:
    return isinstance(value, list) and len(value) == length and {*map(type, value)} <= {bool}
