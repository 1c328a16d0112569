"""Import llama.cpp's `moe-trace`: CSV without a header, one `layer,expert` line per routed expert.

3,17
3,4

The experts of a token at a layer are on consecutive lines, those of a batch's tokens one after the other, then comes the next
layer (github.com/ggml-org/llama.cpp, pull request 28544, examples/moe-trace/moe-trace.cpp; read in the copy of it in
github.com/savoflux-spec/AI.local, commit f830d47). Nothing separates the tokens, so K is taken from the model if it is known,
and otherwise from the lengths of the blocks of one layer: generated tokens are computed one at a time, so that the greatest
common divisor is K. There are no weights, no positions and no length of the prompt.

Two things are missing from prompts. The last layer is computed for the last token of a batch only. And the tool copies the ids
of a batch as if they were adjacent, although in llama.cpp they are a view into the ranking of all E experts: a block then holds
the complete rankings of its first tokens instead of the K best of each. Such blocks are recognized, as nothing else lists E
different experts, and only their first token is imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from profiler.errors import UNREADABLE, TraceError, first_line
from profiler.importers.known_model import known_model
from profiler.importers.reading import files_of, head, sources_of, text_lines
from profiler.importers.rows import MAX_LAYER, ImportedRows
from profiler.importers.target import Target
from profiler.trace.schema import DECODE, MAX_EXPERTS, MAX_TOP_K, PREFILL

NAME = "llama-cpp"
ABOUT = "llama.cpp moe-trace CSV without a header: layer,expert, one line per routed expert; no weights"
KINDS = ("file", "folder")
PATTERN = "*.csv"
MAX_FIELD_BYTES = 32
# A file is put together as a whole, in arrays of some twenty times its size: a sequence of tens of thousands of tokens.
MAX_FILE_BYTES = 128 << 20


def detect(source: Path) -> bool:
    files = files_of(source, PATTERN)
    lines = head(files[0]).splitlines()[:2] if files else []
    return bool(lines) and all(
        len(fields) == 2 and all(map(str.isdecimal, fields)) for fields in (line.split(",") for line in lines)
    )


def read(source: Path, target: Target) -> None:
    target.gaps.append(
        "each file was taken as one sequence; tokens computed one at a time as generated, all others as the prompt"
    )
    entry = known_model(target.options.model)
    # In two bytes each, the numbers of a whole folder take no more memory than its files do.
    files = [(path, _columns(path)) for path in sources_of(source, PATTERN)]
    if entry is None:
        top_k = int(np.gcd.reduce(np.concatenate([_Blocks.of(layer_N).lengths_B for _, (layer_N, _) in files])))
        target.gaps.append(f"K = {top_k} was inferred: blocks of one layer are multiples of {top_k} lines long")
    else:
        top_k = entry.top_k
    highest = max(int(expert_N.max()) for _, (_, expert_N) in files)
    experts = target.options.num_experts or (highest + 1 if entry is None else entry.experts)
    dropped = 0
    for path, (layer_N, expert_N) in files:
        dropped += _read_sequence(path, layer_N, expert_N, top_k, experts, target)
    if dropped:
        target.gaps.append(
            f"{dropped:,} tokens of prompts were left out: in their place the source ranks all experts for other tokens"
        )


@dataclass(frozen=True)
class _Blocks:
    """The B blocks of consecutive lines of one layer: their first lines, lengths and layers, and the batch each belongs to."""

    starts_B: npt.NDArray[np.int64]
    lengths_B: npt.NDArray[np.int64]
    layers_B: npt.NDArray[np.int64]
    batch_B: npt.NDArray[np.int64]

    @classmethod
    def of(cls, layer_N: npt.NDArray[np.uint16]) -> _Blocks:
        starts_B = np.flatnonzero(np.append(True, layer_N[1:] != layer_N[:-1]))
        layers_B = layer_N[starts_B].astype(np.int64)
        # A new batch begins where the layer does not ascend.
        batch_B = np.cumsum(np.diff(layers_B, prepend=-1) < 0, dtype=np.int64)
        return cls(starts_B, np.diff(np.append(starts_B, len(layer_N))), layers_B, batch_B)


def _read_sequence(
    path: Path, layer_N: npt.NDArray[np.uint16], expert_N: npt.NDArray[np.uint16], top_k: int, experts: int, target: Target
) -> int:
    """Add the tokens of a file; returns how many were left out."""
    blocks = _Blocks.of(layer_N)
    if top_k > MAX_TOP_K:
        raise TraceError(f"{path}: at least {top_k} lines of one layer, expected K lines per token, at most {MAX_TOP_K}")
    odd = blocks.lengths_B[blocks.lengths_B % top_k != 0]
    if len(odd):
        raise TraceError(f"{path}: {odd[0]} lines of one layer, expected a multiple of K = {top_k}")
    tokens_B = blocks.lengths_B // top_k
    tokens_of_batch = np.zeros(int(blocks.batch_B[-1]) + 1, dtype=np.int64)
    np.maximum.at(tokens_of_batch, blocks.batch_B, tokens_B)
    first_of_batch = np.cumsum(tokens_of_batch) - tokens_of_batch
    is_ranking = _are_rankings(blocks, expert_N, top_k, experts)
    # A layer with fewer tokens has the last ones of its batch.
    first_B = (first_of_batch + tokens_of_batch)[blocks.batch_B] - tokens_B
    row_N = np.arange(len(layer_N)) - np.repeat(blocks.starts_B, blocks.lengths_B)
    token_N = (np.repeat(first_B, blocks.lengths_B) + row_N // top_k)[::top_k]
    problem_id = target.problem("llama-cpp", path.stem)
    rows = ImportedRows(np.full(len(token_N), problem_id), token_N, layer_N[::top_k], expert_N.reshape(-1, top_k), None)
    dropped = 0
    if is_ranking:
        is_first_N = row_N[::top_k] == 0
        dropped = int((tokens_of_batch - 1).sum())
        rows = rows.where(is_first_N)
    target.add(rows, str(path))
    known = np.unique(rows.token_ids_N)
    alone = known[tokens_of_batch[np.searchsorted(first_of_batch, known, side="right") - 1] == 1]
    # The first batch is the prompt, even if it has one token.
    generated = alone[alone >= tokens_of_batch[0]]
    target.add_tokens(problem_id, np.setdiff1d(known, generated), PREFILL)
    if len(generated):
        target.add_tokens(problem_id, generated, DECODE)
    return dropped


def _are_rankings(blocks: _Blocks, expert_N: npt.NDArray[np.uint16], top_k: int, experts: int) -> bool:
    """Whether every block of several tokens begins with experts that are all different, as a ranking of all experts does."""
    several = [
        (start, min(length, experts))
        for start, length in zip(blocks.starts_B.tolist(), blocks.lengths_B.tolist(), strict=True)
        if length > top_k
    ]
    return bool(several) and all(len(np.unique(expert_N[start : start + length])) == length for start, length in several)


def _columns(path: Path) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint16]]:
    """Layers and experts `[N]` of a file. Raises `TraceError`, naming the lines, on anything but two numbers a line."""
    if path.stat().st_size > MAX_FILE_BYTES:
        raise TraceError(f"{path}: larger than {MAX_FILE_BYTES >> 20} MiB: record each sequence in a file of its own")
    pieces = [*_pieces(path)]
    if not pieces:
        raise TraceError(f"{path}: no lines")
    layer_N, expert_N = np.concatenate(pieces).T
    return layer_N, expert_N


def _pieces(path: Path) -> Iterator[npt.NDArray[np.uint16]]:
    for lines in text_lines(path):
        where = f"{path}, lines {lines[0][0]}..{lines[-1][0]}"
        texts = [line for _, line in lines]
        if {line.count(b",") for line in texts} != {1}:
            raise TraceError(f"{where}: expected 'layer,expert' on each line")
        fields = b",".join(texts).split(b",")
        # All fields of an array of text take as much memory as the longest one.
        if max(map(len, fields)) > MAX_FIELD_BYTES:
            raise TraceError(f"{where}: expected 'layer,expert' on each line, found more than {MAX_FIELD_BYTES} characters")
        try:
            pairs_N2 = np.array(fields).astype(np.int64).reshape(-1, 2)
        except UNREADABLE as error:
            raise TraceError(f"{where}: expected 'layer,expert' on each line: {first_line(error)}") from error
        for name, values, most in (("layer", pairs_N2[:, 0], MAX_LAYER), ("expert id", pairs_N2[:, 1], MAX_EXPERTS - 1)):
            if values.min() < 0 or values.max() > most:
                raise TraceError(f"{where}: {name} {values.min()}..{values.max()}, expected 0..{most}")
        yield pairs_N2.astype(np.uint16)
