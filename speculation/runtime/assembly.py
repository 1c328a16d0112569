"""The parts of a model with offloaded experts, put together: where experts come from, and how the model gets at them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from profiler.errors import EngineError, ModelError, SpecmoeError, first_line
from profiler.models.moe_modules import MoEBlock, find_moe_blocks, find_top_k
from profiler.models.resolve import ResolvedModel
from speculation.data.tasks import Shape, Task
from speculation.runtime.experts import OffloadedExperts
from speculation.runtime.forward import resident_forward
from speculation.runtime.model_loading import EXPERTS_IMPLEMENTATION, input_width
from speculation.runtime.options import NEXT_GATE, Store
from speculation.runtime.storage.checkpoint import StoredExpert
from speculation.runtime.storage.expert_stores import DiskStore, ExpertStore, HostStore, PackingStore, faster_direct
from speculation.runtime.storage.integer_groups import IntegerGroups
from speculation.runtime.storage.layout import ExpertLayout
from speculation.runtime.transfers import TransferCounts, Transfers


def shape_of(empty: Any, resolved: ResolvedModel, layers: int, experts: int) -> Shape:
    """The sizes of a model without weights."""
    hidden = empty.config.get_text_config(decoder=True).hidden_size
    top_k = find_top_k(find_moe_blocks(empty)[0], hidden) or resolved.metadata.top_k
    return Shape(layers=layers, experts=experts, top_k=top_k, horizon=1, task=Task.WHOLE_PATH)


def open_store(
    store: Store,
    layouts: Sequence[ExpertLayout],
    experts: Sequence[StoredExpert],
    packings: Sequence[IntegerGroups] | None,
    num_experts: int,
    device: torch.device,
    direct: bool | None,
) -> tuple[ExpertStore, str]:
    """The store, and how it reads, in words.

    layouts: of the experts in the checkpoint. packings: how they are packed when they are read; None if they are not.
    """
    bypass = store == Store.disk and (faster_direct(layouts, experts) if direct is None else direct)
    disk = DiskStore(layouts, experts, direct=bypass)
    source: ExpertStore = disk if packings is None else PackingStore(disk, packings, num_experts)
    kept = layouts if packings is None else [packing.layout for packing in packings]
    if store == Store.ram:
        pinned = device.type == "cuda"
        how = "from pinned memory" if pinned else "from memory"
        how += "" if packings is None else f", in {packings[0].bits} bits"
        return HostStore(source, kept, num_experts, pinned=pinned), how
    converted = sum(not weight.is_plain for weight in experts[0])
    how = "from disk, past the page cache" if disk.direct else "from disk, through the page cache"
    how += f"; {converted} of {len(experts[0])} weights are converted at each read" if converted else ""
    if packings is not None:
        stored = sum(tensor.bytes for weight in experts[0] for tensor in weight.tensors)
        how += f"; at each read, {stored / 1e6:.3g} MB are packed to {kept[0].bytes / 1e6:.3g} MB, in {packings[0].bits} bits"
    return source, how


def fill_cache(transfers: Transfers) -> None:
    """Load the experts with which the cache begins."""
    cache = transfers.cache
    with transfers.lock:
        begun = [
            transfers.demand(x // cache.num_experts, x % cache.num_experts, int(cache.slot_of_X[x]))
            for x in np.flatnonzero(cache.slot_of_X >= 0).tolist()
        ]
    for transfer in begun:
        transfers.wait(transfer)
    transfers.counts = TransferCounts()


def check_widths(blocks: Sequence[MoEBlock]) -> None:
    """Raise `SpecmoeError` if experts get another input than routers: it says nothing of the next layer's choice."""
    for block in blocks:
        inputs, width = input_width(block.experts), block.gate.get_parameter("weight").shape[1]
        if inputs != width:
            raise SpecmoeError(
                f"{NEXT_GATE} needs the router's input, of width {width}, but this family's experts get one of width {inputs}: "
                "choose a trained predictor"
            )


def connect(model: Any, modules: Sequence[Any], experts: OffloadedExperts) -> None:
    """Make a model compute its experts through the cache."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    for layer, module in enumerate(modules):
        # Not an attribute that would make it part of the model.
        object.__setattr__(module, "_specmoe", (layer, experts))
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, experts_forward)
    try:
        model.set_experts_implementation(EXPERTS_IMPLEMENTATION)
    except (ValueError, KeyError) as error:
        raise EngineError(f"{type(model).__name__}: its experts cannot be replaced: {first_line(error)}") from error


def experts_forward(
    module: Any, hidden_TD: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """The experts function that is registered with `transformers`: through the cache, or with the module's own weights."""
    connected: tuple[int, OffloadedExperts] | None = getattr(module, "_specmoe", None)
    if connected is None:
        return resident_forward(module, hidden_TD, expert_ids_TK, weights_TK)
    layer, experts = connected
    return experts.forward(layer, module, hidden_TD, expert_ids_TK, weights_TK)


def load_tokenizer(folder: Path) -> Any | None:
    """The tokenizer of a checkpoint; None if it has none. Raises `ModelError` if it cannot be read."""
    from transformers import AutoTokenizer

    names = [path.name for path in folder.iterdir()]
    if not any(name.startswith(("tokenizer", "vocab")) or name.endswith(".model") for name in names):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a file from elsewhere can make a tokenizer's class raise anything
        raise ModelError(f"the tokenizer of {folder} cannot be read: {first_line(error)}") from error
