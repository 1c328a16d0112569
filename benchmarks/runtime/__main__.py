"""Speed of a real model whose experts are on disk or in host memory: with a cache, policies and predictors, and as transformers
offloads them.

    python -m benchmarks.runtime [--expert-mb 40] [--tokens 32] [--folder DIR] [--json FILE]
    python -m benchmarks.runtime --experts 32 --top-k 4 --expert-mb 10
    python -m benchmarks.runtime --device cuda

The model is the embedded one with wider experts: further columns whose output is zero, so that its routing is the trained one
while an expert has as many bytes as that of a real model. Two thirds of these bytes are random, so that no layer of the storage
can leave them out. Every row generates the same tokens after the same prompts, in a process of its own; that they are equal is
checked. Tokens/s are of generated tokens, without the prompts.

On Linux, as root, each process gets a control group that limits its memory, the page cache of its files included, to what the
rows with the same share of experts in a cache need: else the operating system would hold the whole checkpoint in memory. Before
each row, the checkpoint's files are dropped from the page cache.

The predictors are trained first, on the training part of a trace of the embedded prompts with four sampled continuations each;
or they are given with --prefetcher and --reuse. The benchmark's prompts are of the test part.

With another number of experts than the embedded model's 8, routers and experts are random: no predictor is trained, and the
routing is not that of a trained model.

On a GPU, experts are in pinned host memory, and accelerate offloads to host memory. Costs are measured on a CPU only,
so there is no simulation to compare with.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median

from benchmarks.runtime.one_row import run_case
from benchmarks.runtime.predictors import HORIZON, demo_trace, test_prompts, trained
from benchmarks.runtime.processes import drop_from_page_cache, in_process
from benchmarks.runtime.rows import ON_DEMAND, PLAIN, RESIDENT, Case, Measured, cases
from benchmarks.runtime.simulated import Simulator
from benchmarks.runtime.wide_model import widen
from profiler.trace.reader import Trace
from speculation.data.tasks import Task
from speculation.runtime.slots import BUFFERS

DEMO_EXPERTS, DEMO_TOP_K = 8, 2
# Memory of a process without its experts.
OVERHEAD_GB = 0.7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--expert-mb", type=float, default=40.0, help="size of an expert in float32")
    parser.add_argument("--experts", type=int, default=DEMO_EXPERTS, help="experts per layer")
    parser.add_argument("--top-k", type=int, default=DEMO_TOP_K, help="experts per token")
    parser.add_argument("--no-limit", action="store_true", help="do not limit the memory of the rows")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens per prompt")
    parser.add_argument("--folder", type=Path, help="where the model, trace and predictors are kept; default: temporary")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--prefetcher", type=Path, help="run of 'specmoe train' on traces of the embedded model")
    parser.add_argument("--reuse", type=Path, help="the same of the task reuse")
    parser.add_argument("--prefetch", type=int, default=3, help="most experts to prefetch per prediction and layer")
    parser.add_argument("--threshold", type=float, default=0.3, help="least probability of what is prefetched")
    parser.add_argument("--rounds", type=int, default=3, help="how often all rows are run, one after the other")
    parser.add_argument("--only", action="append", help="rows whose name contains this; may be repeated")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--child", nargs=3, metavar=("CASE", "MODEL", "PROMPTS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        case, model, prompts = arguments.child
        print(json.dumps(asdict(run_case(Case(**json.loads(case)), Path(model), json.loads(prompts)))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        report(arguments, folder)


def report(arguments: argparse.Namespace, folder: Path) -> None:
    """Run all rows and print them."""
    is_demo = (arguments.experts, arguments.top_k) == (DEMO_EXPERTS, DEMO_TOP_K)
    model = folder / f"model-{arguments.experts}-{arguments.top_k}-{arguments.expert_mb:g}"
    if not model.is_dir():
        widen(model, arguments.expert_mb * 1e6, None if is_demo else (arguments.experts, arguments.top_k))
    trace = demo_trace(folder / "trace")
    prefetcher = reuse = None
    if is_demo:
        prefetcher = arguments.prefetcher or trained(trace, folder / "run", "recommended-small", Task.NEXT_LAYER, HORIZON)
        reuse = arguments.reuse or trained(trace, folder / "run-reuse", "reuse-small", Task.REUSE)
    prompts = test_prompts(trace)
    done = folder / "measured-trace"
    shutil.rmtree(done, ignore_errors=True)
    rows = [
        replace(row, device=arguments.device, threshold=arguments.threshold, prefetch=arguments.prefetch)
        for row in cases(arguments.tokens, prefetcher, reuse, str(done))
        if row.direct or arguments.device == "cpu"
    ]
    if arguments.only:
        rows = [row for row in rows if row.name == ON_DEMAND or any(part in row.name for part in arguments.only)]
    # The speed of storage changes with time: rows are compared within a round.
    rounds: list[dict[str, Measured]] = []
    for number in range(arguments.rounds):
        measured: dict[str, Measured] = {}
        for row in rows:
            # Only the first round writes the trace.
            once = row if not number else replace(row, trace=None)
            cached_gb = (8 * int(row.fraction * arguments.experts) + BUFFERS) * arguments.expert_mb / 1e3
            limit = None if arguments.no_limit or row.name in {PLAIN, RESIDENT} else OVERHEAD_GB + cached_gb
            drop_from_page_cache(model)
            measured[row.name] = in_process(once, model, prompts, limit)
            check_output(row, measured)
            print(f"{number + 1}: {row.name}: {measured[row.name].tokens_per_second:.2f} tokens/s", file=sys.stderr, flush=True)
        rounds.append(measured)
    simulator = Simulator(Trace.open(done), arguments.experts)
    print_rows(rows, rounds, simulator, arguments)
    if arguments.json:
        found = [
            {"round": number, **asdict(row), **asdict(measured[row.name])}
            for number, measured in enumerate(rounds)
            for row in rows
        ]
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


def check_output(row: Case, measured: dict[str, Measured]) -> None:
    """Stop if a row generated other tokens than the first one of our runtime."""
    reference = measured.get(ON_DEMAND)
    if reference is None:
        return
    for own, others in zip(measured[row.name].output, reference.output, strict=True):
        if own != others[: len(own)]:
            raise SystemExit(f"{row.name} generated other tokens than {ON_DEMAND}: {own} instead of {others[: len(own)]}")


def print_rows(
    rows: list[Case], rounds: list[dict[str, Measured]], simulator: Simulator, arguments: argparse.Namespace
) -> None:
    """Print the table: medians over the rounds, each ratio within its round."""
    base = rounds[0][ON_DEMAND]
    copy_seconds = [one.copy_seconds for measured in rounds for one in measured.values() if one.copy_seconds]
    limit = "no limit of memory" if arguments.no_limit else f"memory, page cache included: {OVERHEAD_GB} GB and the cache"
    print(
        f"{arguments.expert_mb:g} MB per expert, 8 layers of {arguments.experts} experts, top-{arguments.top_k}; "
        f"{len(base.output)} prompts, {arguments.tokens} new tokens each; {limit}; {len(rounds)} rounds; a transfer takes "
        f"{min(copy_seconds) * 1e3:.0f} to {max(copy_seconds) * 1e3:.0f} ms, an expert {base.expert_seconds * 1e3:.1f} ms"
    )
    header = (
        f"{'':24}{'tokens/s':>9}{'(all rounds)':>16}{'x on demand':>12}{'x lru':>7}{'hits':>7}{'MB/token':>10}{'waiting':>9}"
    )
    print(header + f"{'x simulated':>12}{'peak GB':>9}")
    for row in rows:
        found = [measured[row.name] for measured in rounds]
        speeds = [one.tokens_per_second for one in found]
        lru = f"{row.fraction:.0%} lru"
        pairs = [(one, measured) for one, measured in zip(found, rounds, strict=True)]
        expected = [simulator.tokens_per_second(row, one, measured[ON_DEMAND]) for one, measured in pairs]
        ratios = [speed / value for speed, value in zip(speeds, expected, strict=True) if value]
        ratio = median(one.tokens_per_second / measured[ON_DEMAND].tokens_per_second for one, measured in pairs)
        by_lru = [one.tokens_per_second / measured[lru].tokens_per_second for one, measured in pairs if lru in measured]
        one = found[0]
        print(
            f"{row.name:24}{median(speeds):9.2f}{f'({min(speeds):.2f}-{max(speeds):.2f})':>16}{ratio:12.2f}"
            + (f"{median(by_lru):7.2f}" if by_lru else " " * 7)
            + (f"{one.hit_rate:7.3f}{one.megabytes_per_token:10.1f}{one.stall:9.0%}" if one.hit_rate is not None else " " * 26)
            + (f"{median(ratios):12.2f}" if ratios else " " * 12)
            + f"{one.memory_gb:9.2f}"
        )
    for row in rows:
        for note in rounds[0][row.name].notes:
            print(f"{row.name}: {note}")


if __name__ == "__main__":
    main()
