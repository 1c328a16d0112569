"""Wrong usage exits with 2, anything else that fails with 1; both with one line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from support.traces import MakeProblems, MakeTrace

from profiler.trace.reader import Trace
from specmoe import main

# Options with values that no files or models make valid, by command; TRACE is a trace, OUT a folder that does not exist.
WRONG = """
collect --model nope --dataset demo-math --out OUT
collect --model demo --dataset nope --out OUT
collect --model demo --dataset demo-math,demo-math --out OUT
collect --model demo --dataset demo-math --engine x --out OUT
collect --model demo --dataset demo-math --precision int3 --out OUT
collect --model demo --dataset demo-math --top-p 2 --out OUT
plan --model nope --dataset gsm8k
plan --model demo --dataset nope
plan --model demo --dataset demo-math --gpu nope
convert TRACE OUT --from nope
models nope
inspect
inspect TRACE --nope
export TRACE OUT.json --to nope --slots 1
export TRACE OUT.json --to csv --fraction 2
train TRACE --out OUT --predictor nope
train TRACE --out OUT --horizon 9
train TRACE --out OUT --task whole-path --horizon 2
train TRACE --out OUT --predictor mlp --context 4
train TRACE --out OUT --predictor reuse
train TRACE --out OUT --push-texts
train TRACE --out OUT --predictor popularity --router-inputs
evaluate OUT --trace TRACE --part nope
simulate TRACE --policy nope
simulate TRACE --predictor nope
simulate TRACE --device nope
simulate TRACE --host nope
simulate TRACE --cache-fraction 2
simulate TRACE --model nope
simulate TRACE --ram-gb 1 --ram-fraction 0.5
curve TRACE --out OUT --policy nope
replay TRACE --policy nope
fit nope
fit olmoe --device nope
generate demo --prompt x --cache-fraction 2
generate demo --prompt x --device nope
generate demo --prompt x --policy nope
generate demo --prompt x --cache-fraction 0.5 --cache-gb 1
generate demo --prompt x --predictor nope
"""
FAILING = ["inspect OUT", "train OUT --out OUT", "evaluate TRACE --trace TRACE", "analyze OUT --out OUT", "convert OUT OUT"]


@pytest.fixture
def trace(make_trace: MakeTrace, random_problems: MakeProblems) -> Trace:
    return make_trace(random_problems(count=20, tokens=5, layers=3, num_experts=4, top_k=2), 4)


@pytest.mark.parametrize(
    ("command", "code"), [*((line, 2) for line in WRONG.strip().splitlines()), *((line, 1) for line in FAILING)]
)
def test_the_exit_status_says_whose_fault_it_is(
    command: str, code: int, trace: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = [word.replace("TRACE", str(trace.path)).replace("OUT", str(out)) for word in command.split()]
    monkeypatch.setattr(sys, "argv", ["specmoe", *words])
    with pytest.raises(SystemExit) as raised:
        main()
    error = capsys.readouterr().err
    assert raised.value.code == code, error
    assert error.splitlines()[-1].startswith("specmoe: ")
    assert not out.exists()
