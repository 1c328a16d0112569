"""Host memory that holds some experts, with the others on storage: a cache that evicts the least recently used.

It is a list in order of use, linked in both directions, in one array of records: every operation takes the same time. The last
record, behind those of all experts, is the anchor: `after` it comes the expert used last, `before` it that used longest ago.
Compiled, for the simulation's loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from speculation.offload.numba_recompiling import recompile_after
from speculation.offload.state import record_type

recompile_after(__file__, "speculation.offload.state")


class RamEntry:
    """What host memory knows of one expert: a record of `RAM_ENTRY`.

    before, after: its neighbors in the order of use, `OUT` if it is not in host memory. ready: when its read from storage ends.
    """

    before: int
    after: int
    ready: float


RAM_ENTRY = record_type(RamEntry)
Ram = Sequence[RamEntry]
OUT = -1


def ram_records(resident: npt.NDArray[np.integer[Any]], experts: int) -> npt.NDArray[np.void]:
    """Records of all experts and the anchor.

    resident: the experts that fill host memory at first, the most recently used first. It always holds as many.
    """
    ram = np.zeros(experts + 1, dtype=RAM_ENTRY)
    ram["before"] = ram["after"] = OUT
    ring = np.append(resident, experts)
    ram["before"][np.roll(ring, -1)] = ring
    ram["after"][ring] = np.roll(ring, -1)
    return ram


@numba.njit(cache=True, nogil=True)
def touch(x: int, ram: Ram) -> None:
    """Note that an expert in host memory is used."""
    entry = ram[x]
    ram[entry.before].after = entry.after
    ram[entry.after].before = entry.before
    _put_first(x, ram)


@numba.njit(cache=True, nogil=True)
def admit(x: int, ready: float, ram: Ram) -> None:
    """Put an expert that is not in host memory there, in place of the one used longest ago. ready: when it is read."""
    anchor = ram[len(ram) - 1]
    evicted = ram[anchor.before]
    ram[evicted.before].after = len(ram) - 1
    anchor.before = evicted.before
    evicted.before = OUT
    evicted.after = OUT
    ram[x].ready = ready
    _put_first(x, ram)


@numba.njit(cache=True, nogil=True)
def _put_first(x: int, ram: Ram) -> None:
    anchor = ram[len(ram) - 1]
    entry = ram[x]
    entry.before = len(ram) - 1
    entry.after = anchor.after
    ram[anchor.after].before = x
    anchor.after = x
