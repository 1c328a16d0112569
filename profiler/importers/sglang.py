"""SGLang's expert distribution recorder in mode `per_token`: `.pt` files of `records` and `last_physical_to_logical_map`.

A record is one forward pass: `input_ids`, `positions`, `extend_seq_lens`, `forward_mode`, and `topk_ids_of_layer`, int32
`[L, T, K]` with -1 in dense layers, unused columns and padding. Ids are of physical experts; the map leads to the model's own.
There are no weights. Without request ids (upstream has none), sequences are put together again from positions: a pass over a
prompt begins one, or goes on with one that ended there; decoded rows go on with the running ones, whose order a batch keeps
(sgl-project/sglang, python/sglang/srt/eplb/expert_distribution.py).
"""

from __future__ import annotations

import pickle
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from profiler.capture_stream import first_line
from profiler.errors import UNREADABLE, TraceError
from profiler.importers.olmoe import integers
from profiler.importers.target import EMPTY, MAX_PIECE_BYTES, Target
from profiler.schema import DECODE, PREFILL

NAME = "sglang"
ABOUT = "SGLang expert-distribution dump of mode per_token: a .pt file, or a folder of them; no weights"


def detect(source: Path) -> bool:
    return source.suffix == ".pt" or (source.is_dir() and any(source.glob("*.pt")))


def read(source: Path, target: Target) -> None:
    files = sorted(source.glob("*.pt")) if source.is_dir() else [source]
    named = False
    for path in files:
        document = _load(path)
        records = document.get("records") if isinstance(document, dict) else None
        if not isinstance(records, list) or not records:
            raise TraceError(f"{path}: expected 'records' of mode per_token; a dump of counts is no routing")
        mapping_LP = _mapping(document.get("last_physical_to_logical_map"), path)
        if mapping_LP is not None and mapping_LP.size:
            target.num_experts = max(target.num_experts or 0, int(mapping_LP.max()) + 1)
        sequences = _Sequences(target, path.stem if len(files) > 1 else "dump")
        passes = [_Pass.of(record, mapping_LP, f"{path}, record {number}") for number, record in enumerate(records)]
        layers = sorted({layer for one in passes for layer in one.layers})
        named |= any(one.request_ids is not None for one in passes)
        for one in sorted(passes, key=lambda one: one.number):
            sequences.add(one, layers)
        sequences.finish()
    if not named:
        target.gaps.append("the dump names no requests: sequences were put together from positions")


def _load(path: Path) -> Any:
    """The file's content, tensors and plain values only. Raises `TraceError` on anything else, and on what would not fit."""
    import torch

    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise TraceError(f"{path}: compressed entries, which torch.save does not write")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise TraceError(f"{path}: entries larger than the file")
        return torch.load(path, map_location="cpu", weights_only=True)
    except TraceError:
        raise
    except (*UNREADABLE, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise TraceError(f"{path} is no file of torch.save with tensors and plain values only: {first_line(error)}") from error
    except Exception as error:
        # What a broken pickle makes torch raise is not documented.
        raise TraceError(f"{path} cannot be read: {type(error).__name__}: {first_line(error)}") from error


def _tensor(value: object, dimensions: int, what: str) -> npt.NDArray[Any]:
    import torch

    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_meta or value.ndim != dimensions:
        raise TraceError(f"{what}: expected a tensor of {dimensions} dimensions")
    if value.is_floating_point() or value.is_complex() or value.numel() * value.element_size() > MAX_PIECE_BYTES:
        raise TraceError(f"{what}: expected whole numbers, at most {MAX_PIECE_BYTES >> 20} MiB of them")
    if value.dtype not in (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64):
        raise TraceError(f"{what}: {value.dtype}, expected whole numbers")
    return np.asarray(value.numpy())


def _mapping(value: object, path: Path) -> npt.NDArray[Any] | None:
    """Physical to logical expert ids `[L, P]`."""
    if value is None:
        return None
    mapping_LP = _tensor(value, 2, f"{path}: last_physical_to_logical_map")
    if mapping_LP.size and mapping_LP.min() < 0:
        raise TraceError(f"{path}: last_physical_to_logical_map has a number below 0")
    return mapping_LP


@dataclass(frozen=True)
class _Pass:
    """One forward pass: T tokens, with logical expert ids `[L, T, K]`, `EMPTY` where there is none."""

    number: int
    decode: bool
    vocab_ids_T: npt.NDArray[np.int32]
    positions_T: npt.NDArray[np.int32]
    lengths: list[int]
    request_ids: list[str] | None
    ids_LTK: npt.NDArray[Any]
    layers: list[int]
    where: str

    @classmethod
    def of(cls, record: object, mapping_LP: npt.NDArray[Any] | None, where: str) -> _Pass:
        if not isinstance(record, dict) or "topk_ids_of_layer" not in record:
            raise TraceError(f"{where}: no 'topk_ids_of_layer': the recorder must run in mode per_token")
        ids_LTK = _tensor(record["topk_ids_of_layer"], 3, f"{where}: topk_ids_of_layer")
        tokens = ids_LTK.shape[1]
        nothing = np.empty(0, dtype=np.int32)
        vocab_ids_T = integers(record.get("input_ids"), 1, f"{where}: input_ids") if tokens else nothing
        positions_T = integers(record.get("positions"), 1, f"{where}: positions") if tokens else nothing
        if not tokens <= len(vocab_ids_T) or len(positions_T) < tokens:
            raise TraceError(f"{where}: {len(vocab_ids_T)} input_ids and {len(positions_T)} positions of {tokens} tokens")
        if mapping_LP is not None:
            if len(mapping_LP) != len(ids_LTK) or ids_LTK.max(initial=0) >= mapping_LP.shape[1]:
                raise TraceError(f"{where}: expert ids that last_physical_to_logical_map does not have")
            logical_LTK = mapping_LP[np.arange(len(ids_LTK))[:, None, None], np.maximum(ids_LTK, 0)]
            ids_LTK = np.where(ids_LTK < 0, EMPTY, logical_LTK)
        decode = record.get("forward_mode") in (2, "decode")
        lengths = record.get("extend_seq_lens")
        if decode or lengths is None:
            lengths = [1] * tokens
        if not isinstance(lengths, list) or any(not isinstance(n, int) or n < 0 for n in lengths) or sum(lengths) < tokens:
            raise TraceError(f"{where}: extend_seq_lens {str(lengths)[:60]}, expected the lengths of {tokens} tokens")
        requests = record.get("rids")
        if requests is not None and (not isinstance(requests, list) or len(requests) != len(lengths)):
            raise TraceError(f"{where}: {len(lengths)} sequences, expected as many rids")
        return cls(
            number=record["forward_pass_id"] if isinstance(record.get("forward_pass_id"), int) else 0,
            decode=decode,
            vocab_ids_T=vocab_ids_T[:tokens],
            positions_T=positions_T[:tokens],
            lengths=lengths,
            request_ids=None if requests is None else [str(request) for request in requests],
            ids_LTK=ids_LTK,
            layers=np.flatnonzero((ids_LTK != EMPTY).any((1, 2))).tolist(),
            where=where,
        )


@dataclass
class _Running:
    """A sequence that may go on: its problem, and the position that comes next."""

    problem_id: int
    next_position: int
    pieces: dict[str, list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]] = field(default_factory=dict)


class _Sequences:
    """Puts the passes of one file together into sequences."""

    def __init__(self, target: Target, name: str) -> None:
        self._target = target
        self._name = name
        self._running: list[_Running] = []
        self._by_request: dict[str, _Running] = {}
        self._everything: list[_Running] = []

    def add(self, one: _Pass, layers: list[int]) -> None:
        """Take a pass; `layers`: the MoE layers of the file."""
        first = 0
        matched = 0
        for number, length in enumerate(one.lengths):
            of_T = slice(first, min(first + length, len(one.positions_T)))
            first += length
            positions_T = one.positions_T[of_T]
            # Padding has no expert at any layer.
            there_T = (one.ids_LTK[layers][:, of_T] != EMPTY).any((0, 2))
            if not len(positions_T) or not there_T.any():
                continue
            request = None if one.request_ids is None else one.request_ids[number]
            start = int(positions_T[0])
            sequence, matched = self._find(request, start, matched, in_order=one.decode)
            sequence.next_position = int(positions_T[-1]) + 1
            phase = DECODE if one.decode or (length == 1 and sequence.pieces) else PREFILL
            sequence.pieces.setdefault(phase, []).append((positions_T[there_T], one.vocab_ids_T[of_T][there_T]))
            ids_TLK = one.ids_LTK[layers][:, of_T][:, there_T].transpose(1, 0, 2)
            self._target.add_arrays(sequence.problem_id, positions_T[there_T], layers, ids_TLK, None, one.where)

    def finish(self) -> None:
        """Hand on what is known of the tokens."""
        for sequence in self._everything:
            for phase, pieces in sequence.pieces.items():
                positions_T, vocab_ids_T = (np.concatenate(arrays) for arrays in zip(*pieces, strict=True))
                positions_T, at_T = np.unique(positions_T, return_index=True)
                self._target.add_tokens(sequence.problem_id, positions_T, phase, vocab_ids_T=vocab_ids_T[at_T])

    def _find(self, request: str | None, start: int, matched: int, *, in_order: bool) -> tuple[_Running, int]:
        """The sequence that goes on at `start`, or a new one; and how far the running ones have been gone through."""
        if request is not None:
            if request not in self._by_request:
                self._by_request[request] = self._begin(start, request)
            return self._by_request[request], matched
        candidates = range(matched if in_order else 0, len(self._running))
        for at in candidates:
            if self._running[at].next_position == start and (start > 0):
                return self._running[at], at + 1 if in_order else matched
        return self._begin(start, str(len(self._everything))), matched

    def _begin(self, start: int, name: str) -> _Running:
        sequence = _Running(self._target.problem("sglang", self._name, name), start)
        self._running.append(sequence)
        self._everything.append(sequence)
        return sequence
