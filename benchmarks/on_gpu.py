"""The commands that use a GPU but not vLLM: generation with offloaded experts, training, evaluation and replay of real routing.

    python -m benchmarks.on_gpu TRAIN_TRACE VALIDATION_TRACE --out FOLDER [--seconds 200] [--model gpt-oss-20b]

Every step is a `specmoe` command in a separate process. `FOLDER/on_gpu.json` is rewritten after each step, so that an
interrupted run keeps its results.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("validation", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=200.0)
    parser.add_argument("--model", default="gpt-oss-20b")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    steps: list[dict[str, Any]] = []

    def run(name: str, arguments: list[str], seconds: float, result: Path | None = None) -> bool:
        left = options.seconds - (time.monotonic() - began)
        started = time.monotonic()
        step: dict[str, Any] = {"name": name, "command": ["specmoe", *arguments]}
        if left < 5:
            step["error"] = "no time was left"
        else:
            try:
                done = subprocess.run(
                    [sys.executable, "-m", "specmoe", *arguments], capture_output=True, text=True, timeout=min(left, seconds)
                )
                step |= {"exit_code": done.returncode, "output": done.stdout[-3000:], "messages": done.stderr[-1500:]}
            except subprocess.TimeoutExpired:
                step["error"] = f"stopped after {min(left, seconds):.0f} s"
        step["seconds"] = round(time.monotonic() - started, 1)
        if result is not None and result.is_file():
            step["result"] = json.loads(result.read_text(encoding="utf-8"))
        steps.append(step)
        (options.out / "on_gpu.json").write_text(json.dumps(steps, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {step['seconds']} s, exit code {step.get('exit_code')}\n{step.get('output', '')}", flush=True)
        if step.get("exit_code"):
            print(step["messages"], flush=True)
        return step.get("exit_code") == 0

    train, validation, out = str(options.train), str(options.validation), options.out
    # Offloading must not change a token, on this device either.
    generated = []
    for name, cached in (("everything", "1"), ("a quarter", ".25"), ("nothing", "0")):
        file = out / f"generate-{cached}.json"
        tried = ["--cache-fraction", cached, "--policy", "ewma", "--predictor", "next-gate", "--json", str(file)]
        fixed = ["--dataset", "demo-code", "--num-problems", "3", "--max-new-tokens", "48", "--dtype", "float32"]
        if run(f"generate, {name} cached", ["generate", "demo", *fixed, *tried], 60, file):
            generated.append([each["token_ids"] for each in steps[-1]["result"]["outputs"]])
    print(
        f"generate: {'the same tokens' if generated and generated.count(generated[0]) == 3 else 'NOT the same tokens'}",
        flush=True,
    )
    for predictor, share in (("recommended-small", 0.2), ("recommended", 0.45)):
        folder, board = out / predictor, out / f"{predictor}.json"
        fit = ["train", train, "--validation", validation, "--predictor", predictor, "--out", str(folder)]
        limit = share * options.seconds
        if not run(f"train {predictor}", [*fit, "--max-seconds", f"{limit:.0f}"], limit + 30):
            continue
        evaluate = ["evaluate", str(folder), "--trace", validation, "--part", "all", "--json", str(board)]
        run(f"evaluate {predictor}", evaluate, 60, board)
        replayed = out / f"replay-{predictor}.json"
        replay = [
            "replay",
            validation,
            "--model",
            options.model,
            "--predictor",
            str(folder),
            "--part",
            "all",
            "--tokens",
            "200",
        ]
        run(f"replay with {predictor}", [*replay, "--json", str(replayed)], 60, replayed)


if __name__ == "__main__":
    main()
