"""A model that is named and known gives its number of experts; rows that cannot be of that model are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from profiler.errors import TraceError
from profiler.importers import import_trace
from profiler.importers.rows import ImportOptions
from profiler.models.registry import MODELS, ModelEntry
from profiler.trace.reader import Trace


def convert(
    tmp_path: Path, entry: ModelEntry, *, experts: tuple[int, ...] | None = None, by_source: str | None = None, **o: Any
) -> Trace:
    """Import one token of every MoE layer of a model, with the lowest ids that it can have."""
    ids = list(range(entry.top_k)) if experts is None else list(experts)
    rows: list[dict[str, object]] = [
        {"type": "route", "req_id": "r", "token_idx": 0, "layer": layer, "topk_ids": ids} for layer in entry.moe_layers
    ]
    meta = [] if by_source is None else [{"type": "meta", "model_id": by_source}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*meta, *rows]))
    return import_trace(tmp_path / "in.jsonl", tmp_path / "t", options=ImportOptions(**o))


@pytest.mark.parametrize("name", MODELS)
def test_the_registry_gives_the_facts_of_a_model_by_any_of_its_names(tmp_path: Path, name: str) -> None:
    entry = MODELS[name]
    for number, model in enumerate([name, *entry.checkpoints.values()]):
        folder = tmp_path / str(number)
        folder.mkdir()
        facts = convert(folder, entry, model=model).metadata
        assert (facts.model.num_experts, facts.model.top_k, facts.model.moe_layers) == (
            entry.experts,
            entry.top_k,
            entry.moe_layers,
        )
        assert (facts.model.num_layers, facts.model.renormalized) == (entry.layers, entry.renormalized)
        assert not any("inferred" in gap for gap in facts.gaps)


def test_the_source_may_name_the_model(tmp_path: Path) -> None:
    entry = MODELS["mixtral-8x7b"]
    assert convert(tmp_path, entry, by_source="mistralai/Mixtral-8x7B-v0.1").metadata.model.num_experts == 8


def test_the_option_precedes_the_registry(tmp_path: Path) -> None:
    assert convert(tmp_path, MODELS["mixtral-8x7b"], model="mixtral-8x7b", num_experts=16).metadata.model.num_experts == 16


def test_rows_that_cannot_be_of_the_named_model_are_refused(tmp_path: Path) -> None:
    mixtral = MODELS["mixtral-8x7b"]
    with pytest.raises(TraceError, match="expert id 8, but mixtral-8x7b has 8 experts: name another model"):
        convert(tmp_path, mixtral, experts=(8, 0), model="mixtral-8x7b")
    with pytest.raises(TraceError, match="3 experts per token, but mixtral-8x7b uses 2"):
        convert(tmp_path, mixtral, experts=(0, 1, 2), model="mixtral-8x7b")
    more = next(entry for entry in MODELS.values() if entry.layers > 32 and entry.top_k >= 2)
    with pytest.raises(TraceError, match=r"layer 32,.*but the MoE layers of mixtral-8x7b are 0-31"):
        convert(tmp_path, more, experts=(0, 1), model="mixtral-8x7b")
    # What only the source says may be wrong, and is then not used.
    pruned = convert(tmp_path, mixtral, experts=(9, 0), by_source="mistralai/Mixtral-8x7B-v0.1")
    assert pruned.metadata.model.num_experts == 10


def test_what_the_source_lacks_of_the_model_is_a_gap(tmp_path: Path) -> None:
    rows = {"problem_id": 0, "layer": 3, "token_id": 0, "expert_ids": [5]}
    (tmp_path / "in.jsonl").write_text(json.dumps(rows) + "\n")
    trace = import_trace(tmp_path / "in.jsonl", tmp_path / "t", options=ImportOptions(model="mixtral-8x7b"))
    assert trace.metadata.gaps[:2] == [
        "31 of the 32 MoE layers of mixtral-8x7b are not in the source",
        "1 of the 2 experts that mixtral-8x7b uses per token were recorded",
    ]
