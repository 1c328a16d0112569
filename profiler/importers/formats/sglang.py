"""Import dumps of SGLang's expert distribution recorder in mode `per_token`.

A dump is a `.pt` file of `records` and `last_physical_to_logical_map`. A record is one forward pass: `input_ids`, `positions`,
`extend_seq_lens`, `forward_mode`, and `topk_ids_of_layer`, int32 `[L, T, K]` with -1 in dense layers, unused columns and
padding. Its ids are those of physical experts; the map translates them to the model's own (logical) ids. There are no weights
upstream; those of forks, in `topk_weights_of_layer` of the same shape, are read.
Every rank writes a file; with plain tensor parallelism the files are copies of each other (sgl-project/sglang,
python/sglang/srt/eplb/expert_distribution.py, commits dd780ab and 02295fe). The other modes (stat, stat_approx, per_pass) write
counts only.

Without request ids (upstream has none), sequences are reconstructed from positions. A prefill pass starts sequences. A prompt
that starts at a position above 0 continues the prompt of the previous pass that ended there (chunked prefill) or, if there is
none, starts a sequence whose prefix came from a cache. A decode pass has one row for every running sequence, in the order of
the batch,
at whose end new sequences were added: a sequence without a row has ended.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from profiler.errors import TraceError, counted
from profiler.importers.reading import files_in, integer_array, sources_of
from profiler.importers.rows import EMPTY, MAX_LAYER
from profiler.importers.target import Target
from profiler.importers.torch_files import load_plain, tensor_array
from profiler.trace.schema import DECODE, MAX_TOP_K, PREFILL

NAME = "sglang"
ABOUT = "SGLang expert-distribution dump of mode per_token: a .pt file, or a folder of them; weights of forks only"
KINDS = ("file", "folder")

DECODE_MODES = (2, "decode")


def detect(source: Path) -> bool:
    return (source.suffix == ".pt" and source.is_file()) or (source.is_dir() and bool(files_in(source, "*.pt")))


def read(source: Path, target: Target) -> None:
    files = sources_of(source, "*.pt")
    seen: set[bytes] = set()
    copies = ambiguous = 0
    named = True
    for path in files:
        passes = _passes(path, target)
        digest = hashlib.sha256()
        for step in passes:
            step.hash_into(digest)
        if digest.digest() in seen:
            copies += 1
            continue
        seen.add(digest.digest())
        named &= all(step.request_ids is not None for step in passes)
        layers = sorted({layer for step in passes for layer in step.layers})
        sequences = _SequenceAssembler(target, path.stem if len(files) > 1 else "dump")
        for step in passes:
            sequences.add(step, layers)
        sequences.finish()
        ambiguous += sequences.ambiguous
    if copies:
        target.gaps.append(f"{copies} of {len(files)} files are copies of other ranks' files and were left out")
    if not named:
        target.gaps.append("the dump has no request ids: sequences were reconstructed from positions")
    if ambiguous:
        target.gaps.append(
            f"{ambiguous:,} decoded tokens fit several sequences; each was assigned to the last one in the batch"
        )


def _passes(path: Path, target: Target) -> list[_ForwardPass]:
    document = load_plain(path)
    records = document.get("records") if isinstance(document, dict) else None
    if not isinstance(records, list) or not records:
        raise TraceError(f"{path}: expected 'records' of mode per_token; a dump of counts contains no routing")
    mapping_LP = _mapping(document.get("last_physical_to_logical_map"), path)
    if mapping_LP is not None and mapping_LP.size:
        target.num_experts = max(target.num_experts or 0, int(mapping_LP.max()) + 1)
    passes = [_ForwardPass.of(record, mapping_LP, f"{path}, record {number}") for number, record in enumerate(records)]
    return sorted(passes, key=lambda step: step.number)


def _mapping(value: object, path: Path) -> npt.NDArray[Any] | None:
    """The logical expert id of each of the P physical experts, per layer: `[L, P]`."""
    if value is None:
        return None
    mapping_LP = tensor_array(value, 2, f"{path}: last_physical_to_logical_map")
    if mapping_LP.size and mapping_LP.min() < 0:
        raise TraceError(f"{path}: last_physical_to_logical_map has a number below 0")
    return mapping_LP


@dataclass(frozen=True)
class _ForwardPass:
    """One forward pass: T tokens with logical expert ids `[L, T, K]`, `EMPTY` in slots without an expert, and their weights."""

    number: int
    decode: bool
    vocab_ids_T: npt.NDArray[np.int64]
    positions_T: npt.NDArray[np.int64]
    lengths: list[int]
    request_ids: list[str] | None
    ids_LTK: npt.NDArray[Any]
    weights_LTK: npt.NDArray[Any] | None
    layers: list[int]
    where: str

    @classmethod
    def of(cls, record: object, mapping_LP: npt.NDArray[Any] | None, where: str) -> _ForwardPass:
        if not isinstance(record, dict) or "topk_ids_of_layer" not in record:
            raise TraceError(f"{where}: no 'topk_ids_of_layer': the recorder must run in mode per_token")
        ids_LTK = tensor_array(record["topk_ids_of_layer"], 3, f"{where}: topk_ids_of_layer")
        layers, tokens, top_k = ids_LTK.shape
        if layers > MAX_LAYER or top_k > MAX_TOP_K:
            raise TraceError(f"{where}: {layers} layers and {top_k} experts per token are more than a trace can hold")
        weights_LTK = None
        if record.get("topk_weights_of_layer") is not None:
            what = f"{where}: topk_weights_of_layer"
            weights_LTK = tensor_array(record["topk_weights_of_layer"], 3, what, floating=True)
            if weights_LTK.shape != ids_LTK.shape:
                raise TraceError(f"{what} of shape {weights_LTK.shape}, expected that of the ids, {ids_LTK.shape}")
        vocab_ids_T = integer_array(record.get("input_ids"), f"{where}: input_ids")
        positions_T = integer_array(record.get("positions"), f"{where}: positions")
        if min(len(vocab_ids_T), len(positions_T)) < tokens:
            raise TraceError(
                f"{where}: {len(vocab_ids_T)} input_ids and {counted(len(positions_T), 'position')} for "
                f"{counted(tokens, 'token')}"
            )
        if mapping_LP is not None:
            if len(mapping_LP) != len(ids_LTK) or ids_LTK.max(initial=0) >= mapping_LP.shape[1]:
                raise TraceError(f"{where}: expert ids that are not in last_physical_to_logical_map")
            logical_LTK = mapping_LP[np.arange(len(ids_LTK))[:, None, None], np.maximum(ids_LTK, 0)]
            ids_LTK = np.where(ids_LTK < 0, EMPTY, logical_LTK)
        mode = record.get("forward_mode")
        decode = type(mode) in (int, str) and mode in DECODE_MODES
        lengths = [1] * tokens
        if not decode and record.get("extend_seq_lens") is not None:
            lengths = integer_array(record["extend_seq_lens"], f"{where}: extend_seq_lens").tolist()
        if sum(lengths) < tokens:
            raise TraceError(f"{where}: extend_seq_lens of {sum(lengths)} tokens in all, expected {tokens}")
        requests = record.get("rids")
        if requests is not None and not (
            isinstance(requests, list) and len(requests) == len(lengths) and {*map(type, requests)} <= {str, int}
        ):
            raise TraceError(f"{where}: expected rids, strings or numbers, for {len(lengths)} sequences")
        return cls(
            number=record["forward_pass_id"] if type(record.get("forward_pass_id")) is int else 0,
            decode=decode,
            vocab_ids_T=vocab_ids_T[:tokens],
            positions_T=positions_T[:tokens],
            lengths=lengths,
            request_ids=None if requests is None else [str(request) for request in requests],
            ids_LTK=ids_LTK,
            weights_LTK=weights_LTK,
            layers=np.flatnonzero((ids_LTK != EMPTY).any((1, 2))).tolist(),
            where=where,
        )

    def hash_into(self, digest: Any) -> None:
        """Update the digest with everything that is identical in copies of the pass by other ranks."""
        for array in (self.vocab_ids_T, self.positions_T, np.ascontiguousarray(self.ids_LTK, dtype=np.int64)):
            digest.update(str(array.shape).encode())
            digest.update(array.tobytes())


@dataclass(eq=False)
class _RunningSequence:
    """A sequence that may continue: its problem, and its next position."""

    problem_id: int
    next_position: int
    pieces: dict[str, list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]] = field(default_factory=dict)


class _SequenceAssembler:
    """Assembles the passes of one file into sequences. ambiguous: number of decoded rows that fit several sequences."""

    def __init__(self, target: Target, name: str) -> None:
        self.ambiguous = 0
        self._target = target
        self._name = name
        # In the order of the batch.
        self._running: list[_RunningSequence] = []
        # Sequences of the last prefill pass: the next pass may continue one of their prompts (chunked prefill).
        self._last_prompts: list[_RunningSequence] = []
        self._by_request: dict[str, _RunningSequence] = {}
        self._everything: list[_RunningSequence] = []

    def add(self, step: _ForwardPass, layers: list[int]) -> None:
        """Add a pass. layers: the MoE layers of the file."""
        ends = np.minimum(np.cumsum([0, *step.lengths]), len(step.positions_T)).tolist()
        spans = [slice(first, end) for first, end in pairwise(ends)]
        ids_LTK = step.ids_LTK[layers]
        # Padding has no expert at any layer.
        present_T = (ids_LTK != EMPTY).any((0, 2))
        rows = [number for number, span in enumerate(spans) if span.stop > span.start and present_T[span].any()]
        starts = [int(step.positions_T[spans[number].start]) for number in rows]
        if step.request_ids is not None:
            sequences = [self._of_request(step.request_ids[number], start) for number, start in zip(rows, starts, strict=True)]
        elif step.decode:
            sequences = self._decoded(starts)
        else:
            sequences = self._prompts(starts)
        for number, sequence in zip(rows, sequences, strict=True):
            span = spans[number]
            positions_T, mine_T = step.positions_T[span], present_T[span]
            sequence.next_position = int(positions_T[-1]) + 1
            phase = DECODE if step.decode else PREFILL
            sequence.pieces.setdefault(phase, []).append((positions_T[mine_T], step.vocab_ids_T[span][mine_T]))
            ids_TLK = ids_LTK[:, span][:, mine_T].transpose(1, 0, 2)
            weights_TLK = None
            if step.weights_LTK is not None:
                weights_TLK = step.weights_LTK[layers][:, span][:, mine_T].transpose(1, 0, 2)
            self._target.add_arrays(sequence.problem_id, positions_T[mine_T], layers, ids_TLK, weights_TLK, step.where)

    def finish(self) -> None:
        """Pass the phases and vocabulary ids of all tokens to the target."""
        for sequence in self._everything:
            known: set[int] = set()
            for phase, pieces in sequence.pieces.items():
                positions_T, vocab_ids_T = (np.concatenate(arrays) for arrays in zip(*pieces, strict=True))
                positions_T, at_T = np.unique(positions_T, return_index=True)
                new_T = ~np.isin(positions_T, list(known))
                known |= set(positions_T.tolist())
                if new_T.any():
                    vocab_ids = vocab_ids_T[at_T][new_T]
                    self._target.add_tokens(sequence.problem_id, positions_T[new_T], phase, vocab_ids_T=vocab_ids)

    def _of_request(self, request: str, start: int) -> _RunningSequence:
        if request not in self._by_request:
            self._by_request[request] = self._begin(start, request)
        return self._by_request[request]

    def _prompts(self, starts: list[int]) -> list[_RunningSequence]:
        """The sequences that start at these positions, or continue there (chunked prefill)."""
        unfinished = list(self._last_prompts)
        sequences = []
        for start in starts:
            sequence = next((sequence for sequence in unfinished if start and sequence.next_position == start), None)
            if sequence is not None:
                unfinished.remove(sequence)
            else:
                sequence = self._begin(start, str(len(self._everything)))
                self._running.append(sequence)
            sequences.append(sequence)
        self._last_prompts = sequences
        return sequences

    def _decoded(self, starts: list[int]) -> list[_RunningSequence]:
        """The running sequences that continue at these positions, in the order of the batch; the others have ended."""
        fits, rows = Counter(sequence.next_position for sequence in self._running), Counter(starts)
        self.ambiguous += sum(count for start, count in rows.items() if fits[start] > count)
        found: list[_RunningSequence] = []
        before = len(self._running)
        # Matched from the end: the sequences there are new, so they certainly have a row.
        for start in reversed(starts):
            at = next((at for at in range(before - 1, -1, -1) if self._running[at].next_position == start), None)
            if at is None:
                found.append(self._begin(start, str(len(self._everything))))
            else:
                before = at
                found.append(self._running[at])
        self._running = found[::-1]
        self._last_prompts = []
        return self._running

    def _begin(self, start: int, name: str) -> _RunningSequence:
        sequence = _RunningSequence(self._target.problem("sglang", self._name, name), start)
        self._everything.append(sequence)
        return sequence
