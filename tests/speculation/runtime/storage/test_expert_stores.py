"""Stores of experts may be read by several threads at the same time."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from profiler.models.resolve import demo_model_folder
from speculation.runtime import CacheSize, OffloadedModel
from speculation.runtime.storage.expert_stores import PackingStore
from speculation.runtime.storage.integer_groups import IntegerGroups
from speculation.runtime.storage.layout import ExpertLayout, Weight, allocate

EXPERTS, THREADS = 8, 4
CPU = torch.device("cpu")


class SlowDisk:
    """Experts whose weights are all equal to their number; others can read while one of them arrives."""

    bytes_read = 0

    def read(self, x: int, memory_B: torch.Tensor) -> None:
        memory_B.view(torch.float32).fill_(x)
        time.sleep(0.002)

    def held(self, x: int) -> torch.Tensor | None:
        return None

    def close(self) -> None:
        pass


def test_experts_that_are_packed_at_the_same_time_are_not_mixed_up() -> None:
    packing = IntegerGroups(8, ExpertLayout((Weight("down_proj", (4, 64), torch.float32),)), is_transposed=False)
    store = PackingStore(SlowDisk(), [packing], EXPERTS)
    memory = allocate(packing.layout, EXPERTS, CPU)
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(store.read, range(EXPERTS), memory))
    for x in range(EXPERTS):
        into = packing.plain.views(allocate(packing.plain, 1, CPU)[0])
        packing.unpack(packing.layout.views(memory[x]), into)
        assert into["down_proj"].flatten().tolist() == pytest.approx([x] * 4 * 64, rel=0.01)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("store", ["disk", "ram"])
def test_a_checkpoint_is_read_by_several_threads(bits: int | None, store: str) -> None:
    size = CacheSize(fraction=0.5)
    with OffloadedModel.load(str(demo_model_folder()), size, store=store, expert_bits=bits, device="cpu") as loaded:
        transfers = loaded.experts.transfers
        transfers.settle()
        found, layouts, per_layer = transfers._store, transfers._layouts, transfers.cache.num_experts
        one, several = ([allocate(layout, per_layer, CPU) for layout in layouts] for _ in range(2))
        began = found.bytes_read
        for x in range(len(layouts) * per_layer):
            found.read(x, one[x // per_layer][x % per_layer])
        before = found.bytes_read
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda x: found.read(x, several[x // per_layer][x % per_layer]), range(len(layouts) * per_layer)))
        for layout, first, second in zip(layouts, one, several, strict=True):
            for expert in range(per_layer):
                sides = layout.views(first[expert]), layout.views(second[expert])
                assert all(torch.equal(sides[0][name], sides[1][name]) for name in sides[0])
        assert found.bytes_read - before == before - began
