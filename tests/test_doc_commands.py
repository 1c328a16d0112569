"""The commands and Python blocks of the documentation do what a reader would see: they are run, in the order of the pages.

Everything runs in one folder, in this process, on the embedded model. What cannot run here is in `NOT_RUN`, with the reason.
The options of all commands are looked up, also of those that are not run.
"""

from __future__ import annotations

import ast
import contextlib
import io
import re
import runpy
import shutil
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support.doc_blocks import ROOT, Block, blocks, pages

from docs.hooks.reference import commands
from profiler.collect.options import RentedOptions
from profiler.terminal_options import plain_signature
from specmoe import main

# Why a command or a block is not run: the first pattern that is found in its text counts.
NOT_RUN = {
    r"^(make|pip|source|jupyter|\.venv\S*/bin/)": "changes the environment",
    r"^modal ": "Modal: needs an account; the jobs are tested offline in tests/modal_jobs",
    r"vllm serve|^curl |^specmoe watch": "a vLLM server; tests/vllm_patch starts one",
    r"import vllm_patch|^python -m vllm_patch check": "starts vLLM; tests/vllm_patch does",
    r"vllm_patch (status|diff|apply|revert)": "changes the installed vLLM; tests/vllm_patch/test_source.py uses a copy",
    r"^specmoe demo": "a minute of training; its parts are the commands that run here",
    r"--push ": "uploads to the Hugging Face hub; tests/profiler/trace/test_hub.py has a hub of its own",
    r"OLMoE|--dataset gsm8k(?!.*--data-files)": "downloads a model or a dataset from the hub",
    r"traces/olmoe|traces/gpt-oss-20b": "needs a trace of a large model",
    r"^python -m benchmarks\.": "a benchmark: minutes to hours",
    r"generate MODEL": "a model of the reader's; the same options run with `demo`",
    r"\.\.\. |--model M |--config path/to|\[NAME\]": "has a gap for the reader to fill",
    r"(inspect|convert) traces/big": "needs an interrupted collection; tests/profiler/collect/test_resume.py interrupts some",
    r"--by category --without looping": "needs a trace with these columns; tests/analysis/report has one",
}
# What a reader puts in place of these words.
STAND_INS = {
    "TRACE": "traces/math",
    "OTHER": "traces/mix",
    "HELD_OUT": "traces/local",
    "RUN": "runs/mlp",
    "traces/bf16": "traces/math",
    "traces/awq": "traces/local",
    "traces/mine": "traces/math",
    "runs/mine": "runs/mlp",
    "runs/mine/evaluation.json": "runs/mlp/evaluation.json",
}
# Added to a command, so that it takes a second: the transformers engine instead of vLLM, and less work.
SHORTER = {
    "collect": {"--engine": "transformers", "--max-new-tokens": "12"},
    "train": {"--epochs": "1", "--epoch-tokens": "256"},
    "replay": {"--tokens": "10"},
    "generate": {"--max-new-tokens": "8"},
}
FEWER = {"20000": "1500"}
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
# Options of other programs that the pages name.
FOREIGN = {
    "vLLM": ["--enable-return-routed-experts", "--moe-backend", "--shutdown-timeout", "--api-server-count"],
    "llama.cpp": ["--n-cpu-moe", "--override-tensor"],
    "KTransformers and SGLang": ["--kt-expert-placement-strategy", "--init-expert-location"],
    "ExLlamaV3": ["--moe_cpu_split", "--moe_cpu_profile"],
    "slime": ["--save-debug-rollout-data"],
    "modal": ["--detach"],
    "pip": ["--extra-index-url", "--no-deps"],
    "pytest": ["--durations"],
    "install.py": ["--tests", "--quantize"],
    "tests/support/fuzz.py": ["--inputs"],
    "every command": ["--help"],
}


def why_not(block: Block) -> str | None:
    """Why a block is not run; None if it is."""
    return next((reason for pattern, reason in NOT_RUN.items() if re.search(pattern, block.text)), None)


def to_run() -> list[Block]:
    """What is run: each text once, where a reader meets it first."""
    first: dict[str, Block] = {}
    for block in blocks():
        if why_not(block) is None:
            first.setdefault(block.text if block.is_python else " ".join(block.words), block)
    return list(first.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The reader's folder, with the files that a reader brings: a dataset, and what another tool recorded."""
    place = tmp_path_factory.mktemp("reader")
    questions = [f"A box holds {n} pens and {n + 2} pencils. How many are there?" for n in range(20)]
    pq.write_table(pa.table({"question": questions}), place / "test.parquet")
    routes = np.random.default_rng(0).random((40, 3, 8)).argsort(-1)[:, :, :2]
    np.savez(place / "routes.npz", routed_experts=routes.astype(np.uint8))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with contextlib.chdir(place):
        yield place
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def names() -> dict[str, dict[str, Any]]:
    """The names that the Python blocks of each page define: a page is read from its beginning."""
    return {}


@pytest.mark.parametrize("block", to_run(), ids=lambda block: f"{block.page}:{block.line}")
def test_it_runs(block: Block, folder: Path, names: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    if block.is_python:
        text = block.text.replace('TraceCollector("demo")', 'TraceCollector("demo", engine="transformers")')
        text = text.replace("target_tokens=5000", "target_tokens=600")
        exec(compile(text, f"{block.page}:{block.line}", "exec"), names.setdefault(block.page, {"__name__": "__main__"}))
    elif block.program[0] == "duckdb":
        assert duckdb.execute(block.program[2]).fetchall()
    elif block.program[:1] == ["python"] and block.program[1].startswith("examples/"):
        monkeypatch.setattr(sys, "argv", block.program[1:])
        runpy.run_path(str(ROOT / block.program[1]), run_name="__main__")
    else:
        run_as_a_reader(block.program, monkeypatch)


def run_as_a_reader(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a `specmoe` command, shortened. What an earlier page wrote under the same name is removed first."""
    assert words[0] == "specmoe", f"add a reason to NOT_RUN: {' '.join(words)}"
    arguments = [STAND_INS.get(word, FEWER.get(word, word)) for word in words[1:]]
    for option, value in SHORTER.get(arguments[0], {}).items():
        arguments += [] if option in arguments else [option, value]
    written = [word for option, word in pairwise(arguments) if option == "--out"]
    written += arguments[2:3] if arguments[0] == "convert" else []
    for out in written if "--resume" not in arguments else []:
        shutil.rmtree(out, ignore_errors=True)
        for file in (out, f"{out}.report.json"):
            Path(file).unlink(missing_ok=True)
    monkeypatch.setattr(sys, "argv", ["specmoe", *arguments])
    error = io.StringIO()
    with pytest.raises(SystemExit) as ended, contextlib.redirect_stderr(error):
        main()
    assert ended.value.code in {None, 0}, error.getvalue()
    assert [path for path in written if not Path(path).exists()] == []


def test_every_reason_is_one_of_a_block() -> None:
    assert [reason for pattern, reason in NOT_RUN.items() if not any(why_not(block) == reason for block in blocks())] == []


def command_options() -> dict[str, set[str]]:
    """Command -> its options."""
    return {
        name: {"--help", *(option for each in command.params for option in (*each.opts, *each.secondary_opts))}
        for name, command in commands().items()
    }


def script_options() -> set[str]:
    """The options of benchmarks, and of the Modal jobs, whose entry points have them as parameters."""
    parameters = set(plain_signature(RentedOptions)[0].parameters)
    named = set()
    for path in [*(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "modal_jobs").glob("*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        named |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
        if path.parent.name == "modal_jobs":
            parameters |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    return {name for name in named if name.startswith("--")} | {f"--{name.replace('_', '-')}" for name in parameters}


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_option_exists(page: Path) -> None:
    """Options in a command are its own; those elsewhere in the text are some command's."""
    text, own = page.read_text(encoding="utf-8"), command_options()
    known = script_options().union(*own.values(), *FOREIGN.values())
    assert [option for option in OPTION.findall(text) if option not in known] == []
    shell = [block.text.partition(" #")[0] for block in blocks() if ROOT / block.page == page and not block.is_python]
    for command in [*shell, *re.findall(r"`((?:specmoe|python -m) [^`]+)`", text)]:
        name = next((name for name in own if f"{command} ".startswith(f"{name} ")), None)
        assert [option for option in OPTION.findall(command) if name is not None and option not in own[name]] == [], command
