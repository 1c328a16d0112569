"""How an engine passes finished requests to the process that scores them: framed arrays through a pipe."""

from __future__ import annotations

import json
import struct
from dataclasses import asdict, dataclass
from typing import IO, Any

import numpy as np
import numpy.typing as npt

# The length of the header that follows, in bytes.
_LENGTH = struct.Struct("<I")
_DTYPES = {"expert_ids_TLK": np.uint16, "weights_TLK": np.float16, "positions_T": np.int32, "vocab_ids_T": np.int32}


@dataclass(frozen=True)
class ShadowModel:
    """The model whose requests follow: the first record of a stream."""

    moe_layers: list[int]
    num_experts: int
    top_k: int
    model: str
    engine: str


@dataclass(frozen=True)
class ShadowRequest:
    """The routing of one finished request.

    Attributes:
        expert_ids_TLK: uint16 `[T, L, K]`, as the router chose them.
        weights_TLK: float16 `[T, L, K]`.
        positions_T: int32 `[T]`, ascending positions in the sequence.
        vocab_ids_T: int32 `[T]`, vocabulary ids; -1 if they are unknown.
        prompt_tokens: Length of the prompt.
        engine_tokens: All tokens that the engine had computed when the request finished.
    """

    expert_ids_TLK: npt.NDArray[np.uint16]
    weights_TLK: npt.NDArray[np.float16]
    positions_T: npt.NDArray[np.int32]
    vocab_ids_T: npt.NDArray[np.int32]
    prompt_tokens: int
    engine_tokens: int

    @property
    def nbytes(self) -> int:
        """Size of its arrays."""
        return sum(int(getattr(self, name).nbytes) for name in _DTYPES)


def write_model(stream: IO[bytes], model: ShadowModel) -> None:
    """Write the first record. Raises `OSError` if the reader is gone."""
    _write(stream, asdict(model), [])


def write_request(stream: IO[bytes], request: ShadowRequest) -> None:
    """Write a request. Raises `OSError` if the reader is gone."""
    header = {name: getattr(request, name) for name in ("prompt_tokens", "engine_tokens")}
    arrays = [np.ascontiguousarray(getattr(request, name), dtype=dtype) for name, dtype in _DTYPES.items()]
    _write(stream, {**header, "shape": list(request.expert_ids_TLK.shape)}, arrays)


def read_model(stream: IO[bytes]) -> ShadowModel | None:
    """Read the first record; None if the stream ends before it is complete."""
    header = _read_header(stream)
    return None if header is None else ShadowModel(**header)


def read_request(stream: IO[bytes]) -> ShadowRequest | None:
    """Read the next request; None if the stream ends before it is complete."""
    header = _read_header(stream)
    if header is None:
        return None
    shape = tuple(header["shape"])
    shapes = {"expert_ids_TLK": shape, "weights_TLK": shape, "positions_T": shape[:1], "vocab_ids_T": shape[:1]}
    arrays: dict[str, npt.NDArray[Any]] = {}
    for name, dtype in _DTYPES.items():
        size = int(np.prod(shapes[name])) * np.dtype(dtype).itemsize
        data = stream.read(size)
        if len(data) < size:
            return None
        arrays[name] = np.frombuffer(data, dtype).reshape(shapes[name])
    return ShadowRequest(**arrays, prompt_tokens=header["prompt_tokens"], engine_tokens=header["engine_tokens"])


def _write(stream: IO[bytes], header: dict[str, Any], arrays: list[npt.NDArray[Any]]) -> None:
    text = json.dumps(header).encode()
    stream.write(b"".join([_LENGTH.pack(len(text)), text, *(array.tobytes() for array in arrays)]))
    stream.flush()


def _read_header(stream: IO[bytes]) -> dict[str, Any] | None:
    length = stream.read(_LENGTH.size)
    if len(length) < _LENGTH.size:
        return None
    text = stream.read(_LENGTH.unpack(length)[0])
    # A process that is killed while it writes leaves an incomplete record.
    found: dict[str, Any] | None = json.loads(text) if len(text) == _LENGTH.unpack(length)[0] else None
    return found
