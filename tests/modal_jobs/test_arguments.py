"""`specmoe collect --plan` takes what `modal run modal_jobs/collect.py` takes."""

from __future__ import annotations

import ast
import inspect

from support.offline_modal import ROOT

from profiler.cli import collect


def test_plan_takes_the_arguments_of_the_job() -> None:
    module = ast.parse((ROOT / "modal_jobs" / "collect.py").read_text(encoding="utf-8"))
    main = next(node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    names = {argument.arg for argument in main.args.args}
    assert {"dataset", "model", "num_problems", "gpu", "containers", "max_new_tokens", "out"} <= names
    assert names <= set(inspect.signature(collect).parameters)
