"""Import rollouts of slime and miles: the `.pt` file of `--save-debug-rollout-data`, with router replay.

A file holds `samples`, dictionaries with `tokens` (prompt and response), `response_length` and `rollout_routed_experts`, an
integer array `[T - 1, L, K]` of what SGLang returned: every token but the last, L decoder layers (github.com/THUDM/slime,
slime/utils/types.py `Sample`, commit 0d234f3; github.com/radixark/miles stores the same). There are no weights. Dense layers
are all 0 or -1.

The file is a pickle. It is read only if it holds nothing but plain values, tensors and NumPy arrays of whole numbers; others,
such as rollouts with images, and verl's pickled `DataProto`, are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from profiler.errors import TraceError, counted
from profiler.importers.reading import files_of, integer_array, sources_of
from profiler.importers.rows import EMPTY, MAX_LAYER, layers_with_experts
from profiler.importers.target import Target
from profiler.importers.torch_files import PickledArray, load_plain, mentions, tensor_array
from profiler.trace.schema import DECODE, MAX_TOP_K, PREFILL

NAME = "slime"
ABOUT = "slime or miles rollouts with rollout_routed_experts [T - 1, L, K]: a .pt file, or a folder of them; no weights"
KINDS = ("file", "folder")
FIELD = "rollout_routed_experts"


def detect(source: Path) -> bool:
    files = files_of(source, "*.pt")
    return bool(files) and mentions(files[0], FIELD)


def read(source: Path, target: Target) -> None:
    files = sources_of(source, "*.pt")
    # Dense layers can be recognized only once all files are read: every file is read twice.
    routes = (_routes(sample, where) for path in files for where, sample in _samples(path)[0].values())
    moe_layers, gaps = layers_with_experts(routes, source)
    target.gaps += gaps
    without = 0
    for path in files:
        samples, others = _samples(path)
        without += others
        for number, (where, sample) in samples.items():
            _add(sample, target.problem("slime", path.stem, str(number)), moe_layers, where, target)
    if without:
        target.gaps.append(f"{counted(without, 'sample')} left out: no routed experts")


def _samples(path: Path) -> tuple[dict[int, tuple[str, dict[str, Any]]], int]:
    """The samples of a file that have routes, by their number, with their place as text for messages; how many have none."""
    document = load_plain(path, arrays=True)
    samples = document.get("samples") if isinstance(document, dict) else None
    if not isinstance(samples, list) or not {*map(type, samples)} <= {dict}:
        raise TraceError(f"{path}: expected a list of 'samples'")
    found = {n: (f"{path}, sample {n}", sample) for n, sample in enumerate(samples) if sample.get(FIELD) is not None}
    # A pickle can name an array many times.
    if sum(_routes(sample, where).nbytes for where, sample in found.values()) > path.stat().st_size:
        raise TraceError(f"{path}: the {FIELD} of its samples are larger than the file")
    return found, len(samples) - len(found)


def _routes(sample: dict[str, Any], where: str) -> npt.NDArray[Any]:
    """The expert ids `[T, L, K]` of a sample. Raises `TraceError`, naming `where`, on anything else."""
    value: Any = sample[FIELD]
    value = value.array if isinstance(value, PickledArray) else tensor_array(value, 3, f"{where}: {FIELD}")
    if value.ndim != 3 or value.dtype.kind not in "iu" or 0 in value.shape[1:]:
        raise TraceError(f"{where}: {FIELD} is {value.dtype} of shape {value.shape}, expected whole numbers [T, L, K]")
    if value.shape[1] > MAX_LAYER or value.shape[2] > MAX_TOP_K:
        raise TraceError(
            f"{where}: {value.shape[1]} layers and {value.shape[2]} experts per token are more than a trace can hold"
        )
    return np.asarray(value)


def _add(sample: dict[str, Any], problem_id: int, layers: list[int], where: str, target: Target) -> None:
    ids_TLK = _routes(sample, where)
    if ids_TLK.shape[1] <= layers[-1]:
        raise TraceError(f"{where}: {counted(ids_TLK.shape[1], 'layer')}, but other samples have more")
    vocab_ids_T = integer_array(sample.get("tokens"), f"{where}: tokens")
    if len(ids_TLK) > len(vocab_ids_T):
        raise TraceError(f"{where}: routes of {counted(len(ids_TLK), 'token')}, but there are {len(vocab_ids_T)}")
    generated = sample.get("response_length", 0)
    if type(generated) is not int or not 0 <= generated <= len(vocab_ids_T):
        raise TraceError(f"{where}: response_length {generated!r}, expected 0..{len(vocab_ids_T)}")
    if ids_TLK.dtype.kind == "i":
        ids_TLK = np.maximum(ids_TLK, EMPTY)
    ids_TLK = ids_TLK[:, layers]
    present_T = (ids_TLK >= 0).any((1, 2))
    target.add_arrays(problem_id, np.flatnonzero(present_T), layers, ids_TLK[present_T], None, where)
    positions_T = np.arange(len(vocab_ids_T))
    prompt = len(vocab_ids_T) - generated
    for phase, part in ((PREFILL, slice(prompt)), (DECODE, slice(prompt, None))):
        if len(positions_T[part]):
            target.add_tokens(problem_id, positions_T[part], phase, vocab_ids_T=vocab_ids_T[part])
    for name, value in (("prompt", sample.get("prompt")), ("output", sample.get("response"))):
        if isinstance(value, str):
            target.problems[problem_id].further[name] = value
