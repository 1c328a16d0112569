"""Import what inference servers answer if they return routed experts: JSON, one response a file, a list, or JSON lines.

SGLang's `/generate` puts base64 of int32 `[T - 1, L, K]` without its shape into `meta_info.routed_experts` (sgl-project/sglang,
python/sglang/srt/layers/moe/routed_experts_capturer.py, commit 0837e91; radixark/miles, commit 02aa8e7, decodes the same). Its
`/v1/completions` and `/v1/chat/completions` put it into `sgl_ext` of each choice (pull request 17434).

vLLM puts base64 of a `.npy` file, uint8, uint16 or int32 `[T - 1, L, K]`, into `routed_experts` of each choice, in
`/v1/completions`, `/v1/chat/completions` and `/inference/v1/generate` (vllm-project/vllm 0.32,
vllm/entrypoints/openai/chat_completion/protocol.py). A fork adds the weights, `.npy` of the same shape, as
`routed_expert_weights` (sampazdan/vllm-moe-tools, commit 4afbf3f). SGLang returns none.

L counts all decoder layers; dense ones are 0 throughout. The last token has no row. A request may ask for the rows from some
position on, which the response does not repeat: rows always end one token before the end, so their first position follows from
the numbers of tokens in the response.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic_core import from_json

from profiler.errors import TraceError, counted, first_line
from profiler.importers.known_model import known_model
from profiler.importers.reading import BYTE_ORDER_MARK, NOT_AN_ARRAY, files_of, integer_array, sources_of
from profiler.importers.rows import EMPTY, MAX_LAYER, layers_with_experts
from profiler.importers.target import Target
from profiler.models.registry import ModelEntry
from profiler.trace.schema import DECODE, MAX_TOP_K, PREFILL

NAME = "server-responses"
ABOUT = "responses of SGLang's or vLLM's server with routed_experts in base64: JSON, JSON lines, or a folder of them"
KINDS = ("file", "folder")
PATTERNS = ("*.jsonl", "*.json")
FIELD = "routed_experts"
WEIGHTS_FIELD = "routed_expert_weights"

# How much of a file is searched for the field.
SEARCHED_BYTES = 16 << 20
# A response is decoded at once: 128 MiB of base64 are 50,000 tokens of 61 layers and 8 experts.
MAX_RESPONSE_BYTES = 128 << 20
# The values of a response other than text: token ids, above all. Each takes 50 bytes or more once parsed.
MAX_VALUES = 1 << 22
NPY_MAGIC = b"\x93NUMPY"


def detect(source: Path) -> bool:
    files = files_of(source, *PATTERNS)
    if not files:
        return False
    with files[0].open("rb") as file:
        start = file.read(SEARCHED_BYTES).removeprefix(BYTE_ORDER_MARK)
    return start.lstrip()[:1] in {b"{", b"["} and f'"{FIELD}"'.encode() in start and b"}" in start


@dataclass(frozen=True, kw_only=True)
class _Response:
    """One generated sequence. tokens: its length with the prompt, None if unknown. Vocabulary ids are None where unknown."""

    where: str
    routes: object
    weights: object
    model: str | None
    tokens: int | None
    prompt_ids: list[int] | None
    output_ids: list[int] | None
    texts: dict[str, str]


def read(source: Path, target: Target) -> None:
    files = sources_of(source, *PATTERNS)
    shape = _shape(files, source, target)
    # Dense layers can be recognized only once all files are read: every file is read again.
    routes = (_routes(response, shape) for path in files for response in _with_routes(path))
    moe_layers, gaps = layers_with_experts(routes, source)
    target.gaps += gaps
    without = unplaced = 0
    for path in files:
        name = (path.name,) if len(files) > 1 else ()
        for number, response in enumerate(_responses(path)):
            if response.routes is None:
                without += 1
                continue
            unplaced += response.tokens is None
            _add(response, shape, target.problem("server", *name, str(number)), moe_layers, target)
    if without:
        target.gaps.append(f"{counted(without, 'response')} left out: no routed experts")
    if unplaced:
        target.gaps.append(f"{unplaced:,} responses do not say how many tokens they have: their rows were numbered from 0")


def _with_routes(path: Path) -> Iterator[_Response]:
    return (response for response in _responses(path) if response.routes is not None)


def _add(response: _Response, shape: tuple[int, int] | None, problem_id: int, layers: list[int], target: Target) -> None:
    where = response.where
    ids_TLK = _routes(response, shape)
    if ids_TLK.shape[1] <= layers[-1]:
        raise TraceError(f"{where}: {counted(ids_TLK.shape[1], 'layer')}, but other responses have more")
    weights_TLK = None if response.weights is None else _npy(response.weights, f"{where}: {WEIGHTS_FIELD}", "f")
    if weights_TLK is not None and weights_TLK.shape != ids_TLK.shape:
        raise TraceError(f"{where}: {WEIGHTS_FIELD} of shape {weights_TLK.shape}, expected that of the ids, {ids_TLK.shape}")
    # Of a sequence of T tokens, the last one is never fed back: there are T - 1 rows.
    tokens = len(ids_TLK) + 1 if response.tokens is None else response.tokens
    if len(ids_TLK) > tokens:
        raise TraceError(f"{where}: routes of {counted(len(ids_TLK), 'token')}, but there are {tokens}")
    # A server that was stopped by the last token may have computed it, too.
    first = max(tokens - 1 - len(ids_TLK), 0)
    ids_TLK = ids_TLK[:, layers]
    if ids_TLK.dtype.kind == "i":
        ids_TLK = np.maximum(ids_TLK, EMPTY)
    present_T = (ids_TLK >= 0).any((1, 2))
    ids_TLK = ids_TLK[present_T]
    weights_TLK = None if weights_TLK is None else weights_TLK[:, layers][present_T]
    target.add_arrays(problem_id, first + np.flatnonzero(present_T), layers, ids_TLK, weights_TLK, where)
    prompt = response.prompt_ids
    if prompt is not None:
        target.add_tokens(problem_id, np.arange(len(prompt)), PREFILL, vocab_ids_T=integer_array(prompt, f"{where}: prompt"))
    output = response.output_ids
    if output is not None:
        start = tokens - len(output)
        vocab_ids_T = integer_array(output, f"{where}: token ids")
        if start >= 0:
            target.add_tokens(problem_id, start + np.arange(len(output)), DECODE, vocab_ids_T=vocab_ids_T)
    target.problems[problem_id].further.update(response.texts)


def _routes(response: _Response, shape: tuple[int, int] | None) -> npt.NDArray[Any]:
    """The expert ids `[T, L, K]`. shape: L and K of routes that do not say. Raises `TraceError` if they do not fit."""
    raw = _decoded(response.routes, f"{response.where}: {FIELD}")
    if raw.startswith(NPY_MAGIC):
        return _npy(response.routes, f"{response.where}: {FIELD}", "iu")
    assert shape is not None
    if len(raw) % (4 * shape[0] * shape[1]):
        raise TraceError(
            f"{response.where}: {len(raw) // 4:,} expert ids, which are not those of {shape[0]} layers and {shape[1]} experts "
            "per token"
        )
    return np.frombuffer(raw, dtype="<i4").reshape(-1, *shape)


def _shape(files: list[Path], source: Path, target: Target) -> tuple[int, int] | None:
    """L and K of routes without a shape: the model's, or those that fit all responses; None if every response has a shape.

    Also notes the model that the responses name.
    """
    entry: ModelEntry | None = None
    width: int | None = None
    fitting: list[int] = []
    for path in files:
        for response in _responses(path):
            if response.model is not None:
                target.of_model(path, model_id=response.model, num_experts=None)
            if response.routes is None or entry is not None:
                continue
            raw = _decoded(response.routes, f"{response.where}: {FIELD}")
            if raw.startswith(NPY_MAGIC):
                continue
            entry = known_model(target.options.model) or known_model(target.model_id)
            if entry is not None:
                continue
            rows = (response.tokens or 1) - 1
            if rows <= 0 or len(raw) % (4 * rows) or width not in (None, len(raw) // (4 * rows)):
                raise TraceError(
                    f"{response.where}: {len(raw) // 4:,} expert ids of a sequence of {response.tokens} tokens do not show how "
                    "many layers and experts per token there are: name the model, one that 'specmoe models' lists"
                )
            if width is None:
                width = len(raw) // (4 * rows)
                fitting = [k for k in range(1, min(width, MAX_TOP_K) + 1) if width % k == 0 and width // k <= MAX_LAYER]
            ids = np.frombuffer(raw, dtype="<i4")
            while fitting and not _are_distinct(ids.reshape(-1, fitting[-1])):
                fitting.pop()
    if entry is not None:
        return entry.layers, entry.top_k
    if width is None:
        return None
    if not fitting:
        raise TraceError(f"{source}: {width} expert ids a token are more than a trace can hold")
    target.gaps.append(
        f"K = {fitting[-1]} was inferred: the largest K for which no layer of a token's {width} ids has an expert twice; "
        "name the model to be certain"
    )
    return width // fitting[-1], fitting[-1]


def _are_distinct(ids_NK: npt.NDArray[np.integer[Any]]) -> bool:
    """Whether no row names an expert twice, except for rows of a dense layer, which are 0 or -1 throughout."""
    ordered_NK = np.sort(ids_NK, axis=1)
    repeated_N = (ordered_NK[:, 1:] == ordered_NK[:, :-1]).any(1)
    dense_N = (ordered_NK[:, 0] == ordered_NK[:, -1]) & (ordered_NK[:, 0] <= 0)
    return not (repeated_N & ~dense_N).any()


def _decoded(value: object, where: str) -> bytes:
    if not isinstance(value, str):
        raise TraceError(f"{where}: expected text in base64")
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise TraceError(f"{where} is not base64: {first_line(error)}") from error


def _npy(value: object, where: str, kinds: str) -> npt.NDArray[Any]:
    """An array `[T, L, K]` in base64 of `.npy`, of the given kinds of numbers."""
    raw = _decoded(value, where)
    form: Any = np.lib.format
    file = io.BytesIO(raw)
    try:
        read_header = {(1, 0): form.read_array_header_1_0, (2, 0): form.read_array_header_2_0}[form.read_magic(file)]
        shape, fortran, kind = read_header(file)
    except (*NOT_AN_ARRAY, KeyError) as error:
        raise TraceError(f"{where} is not an array: {first_line(error)}") from error
    if kind.kind not in kinds or len(shape) != 3 or not 1 <= shape[1] <= MAX_LAYER or not 1 <= shape[2] <= MAX_TOP_K:
        raise TraceError(f"{where} is {kind} of shape {shape}, expected numbers [T, L, K]")
    if kind.itemsize * shape[0] * shape[1] * shape[2] != len(raw) - file.tell():
        raise TraceError(f"{where}: shape {shape} does not fit its {len(raw) - file.tell():,} bytes")
    return np.frombuffer(raw, dtype=kind, offset=file.tell()).reshape(shape, order="F" if fortran else "C")


def _responses(path: Path) -> Iterator[_Response]:
    """The generated sequences of a file, in order. Raises `TraceError` on anything but objects or lists of objects."""
    for where, document in _documents(path):
        for number, found in enumerate(document if isinstance(document, list) else [document]):
            place = f"{where}, response {number}" if isinstance(document, list) else where
            if not isinstance(found, dict):
                raise TraceError(f"{place}: expected an object")
            yield from _sequences(found, place)


def _sequences(found: dict[str, Any], where: str) -> Iterator[_Response]:
    choices = found.get("choices")
    if not isinstance(choices, list):
        yield _of_generate(found, where)
        return
    usage, shared = _part(found, "usage"), _part(found, "sgl_ext")
    for number, choice in enumerate(choices):
        place = f"{where}, choice {number}"
        if not isinstance(choice, dict):
            raise TraceError(f"{place}: expected an object")
        extra = _part(choice, "sgl_ext") or _part(choice, "meta_info") or (shared if len(choices) == 1 else {})
        routes = choice.get(FIELD) if choice.get(FIELD) is not None else extra.get(FIELD)
        prompt_ids, output_ids = _ids(choice, "prompt_token_ids") or _ids(found, "prompt_token_ids"), _ids(choice, "token_ids")
        tokens = None if prompt_ids is None or output_ids is None else len(prompt_ids) + len(output_ids)
        if tokens is None and len(choices) == 1:
            tokens = _sum(usage.get("prompt_tokens"), usage.get("completion_tokens"))
        output = choice.get("text", _part(choice, "message").get("content"))
        yield _Response(
            where=place,
            routes=routes or None,
            weights=choice.get(WEIGHTS_FIELD),
            model=found["model"] if isinstance(found.get("model"), str) else None,
            tokens=tokens,
            prompt_ids=prompt_ids,
            output_ids=output_ids,
            texts=_texts(prompt=found.get("prompt"), output=output, finish_reason=choice.get("finish_reason")),
        )


def _of_generate(found: dict[str, Any], where: str) -> _Response:
    """The sequence of a response of SGLang's `/generate`."""
    meta = _part(found, "meta_info")
    generated, prompt_ids = meta.get("completion_tokens"), _ids(found, "input_ids")
    output_ids = _ids(found, "output_ids")
    if output_ids is None or len(output_ids) != generated:
        logprobs = meta.get("output_token_logprobs")
        output_ids = None
        if isinstance(logprobs, list) and len(logprobs) == generated and {*map(type, logprobs)} <= {list}:
            output_ids = [entry[1] for entry in logprobs if len(entry) > 1]
    reason = meta.get("finish_reason")
    return _Response(
        where=where,
        routes=meta.get(FIELD) or None,
        weights=None,
        model=None,
        tokens=_sum(meta.get("prompt_tokens"), generated),
        prompt_ids=prompt_ids if prompt_ids is not None and len(prompt_ids) == meta.get("prompt_tokens") else None,
        output_ids=output_ids,
        texts=_texts(
            prompt=found.get("prompt"),
            output=found.get("text"),
            finish_reason=reason.get("type") if isinstance(reason, dict) else reason,
        ),
    )


def _part(found: dict[str, Any], name: str) -> dict[str, Any]:
    part = found.get(name)
    return part if isinstance(part, dict) else {}


def _ids(found: dict[str, Any], name: str) -> list[int] | None:
    ids = found.get(name)
    return ids if isinstance(ids, list) else None


def _sum(prompt: object, generated: object) -> int | None:
    if not isinstance(prompt, int) or not isinstance(generated, int) or min(prompt, generated) < 0:
        return None
    return min(prompt + generated, 2**31)


def _texts(**values: object) -> dict[str, str]:
    return {name: value for name, value in values.items() if isinstance(value, str)}


def _documents(path: Path) -> Iterator[tuple[str, Any]]:
    """The JSON values of a file with their place: one a line, or the whole file where the first line is not one."""
    with path.open("rb") as file:
        if file.read(len(BYTE_ORDER_MARK)) != BYTE_ORDER_MARK:
            file.seek(0)
        begin = file.tell()
        number = 0
        while line := file.readline(MAX_RESPONSE_BYTES + 1):
            number += 1
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                found = _parsed(line, where)
            except ValueError as error:
                if begin < 0:
                    raise TraceError(f"{where}: not JSON: {first_line(error)}") from error
                file.seek(begin)
                try:
                    found = _parsed(file.read(MAX_RESPONSE_BYTES + 1), f"{path}")
                except ValueError as broken:
                    raise TraceError(f"{path}: not JSON: {first_line(broken)}") from broken
                yield f"{path}", found
                return
            begin = -1
            yield where, found


def _parsed(text: bytes, where: str) -> Any:
    if len(text) > MAX_RESPONSE_BYTES:
        raise TraceError(f"{where}: longer than {MAX_RESPONSE_BYTES >> 20} MiB: store a response on each line")
    if text.count(b",") + text.count(b"[") + text.count(b"{") > MAX_VALUES:
        raise TraceError(f"{where}: more than {MAX_VALUES:,} values: store a response on each line")
    return from_json(text)
