"""Host memory in front of storage evicts like an ordered dictionary."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from speculation.offload.simulation.host_memory import OUT, admit, ram_records, touch


@settings(deadline=None)  # the first call compiles
@given(st.integers(1, 6), st.lists(st.integers(0, 5), max_size=60))
def test_as_an_ordered_dictionary(capacity: int, used: list[int]) -> None:
    ram = ram_records(np.arange(capacity), 6)
    plain = OrderedDict.fromkeys(range(capacity - 1, -1, -1))
    for time, x in enumerate(used):
        assert (ram["before"][x] != OUT) == (x in plain)
        if x in plain:
            touch(x, ram)
        else:
            plain.popitem(last=False)
            plain[x] = None
            admit(x, float(time), ram)
            assert ram["ready"][x] == time
        plain.move_to_end(x)
        assert set(np.flatnonzero(ram["before"][:-1] != OUT).tolist()) == set(plain)
    order, x = [], int(ram["after"][-1])
    while x != 6:
        order.append(x)
        x = int(ram["after"][x])
    assert order == list(reversed(plain))
