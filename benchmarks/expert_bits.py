"""Experts in 8 and 4 bits: what they take, how fast they are on this machine, and what rounding them changes.

    python -m benchmarks.expert_bits [--expert-mb 10] [--tokens 24] [--rounds 3] [--dtype bfloat16] [--folder DIR]

What rounding changes is measured on the embedded model: its greedy continuations of the embedded prompts are given to the
rounded model, whose likeliest tokens and experts are compared with its own, at each generated token.

Speed is measured on the embedded model with wider experts (see `benchmarks.runtime`), in host memory and on disk: the time and
the CPU seconds of all threads per generated token. Other programs on the machine change the CPU seconds less. Rows are compared
within a round. Rounded experts may generate other tokens, whose hits differ.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.runtime.wide_model import widen
from profiler.datasets.problems import read_problems
from profiler.datasets.registry import DEMO_DATASETS, find_dataset
from speculation.runtime.model import OffloadedModel
from speculation.runtime.options import CacheSize
from speculation.runtime.steps import ForwardPass

BITS = (None, 8, 4)
# So many embedded prompts are continued to measure speed.
TIMED_PROMPTS = 2


@dataclass(frozen=True)
class Row:
    """One way of running the wide model."""

    name: str
    store: str
    cache: CacheSize


@dataclass(frozen=True)
class Measured:
    """What one run measured. seconds, cpu_seconds: per token, prompts included."""

    expert_megabytes: float
    capacity: int
    hit_rate: float
    megabytes_per_token: float
    seconds: float
    cpu_seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--expert-mb", type=float, default=10.0, help="size of an expert in float32")
    parser.add_argument("--tokens", type=int, default=24, help="new tokens per prompt")
    parser.add_argument("--rounds", type=int, default=3, help="how often all rows are run")
    parser.add_argument("--dtype", default="bfloat16", help="type that is computed with")
    parser.add_argument("--only", choices=("changes", "speed"), help="measure only one of the two")
    parser.add_argument("--folder", type=Path, help="where the wide model is kept; default: temporary")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    prompts = [problem.prompt for name in DEMO_DATASETS for problem in read_problems(find_dataset(name))]
    if arguments.only != "speed":
        print_changes(prompts, arguments.tokens)
    if arguments.only == "changes":
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        model = folder / f"wide-{arguments.expert_mb:g}"
        if not model.is_dir():
            widen(model, arguments.expert_mb * 1e6, None)
        print_speed(model, prompts[:TIMED_PROMPTS], arguments)


def print_changes(prompts: list[str], tokens: int) -> None:
    """What rounding the embedded model's experts changes."""
    with OffloadedModel.load("demo", CacheSize(fraction=1.0), device="cpu", dtype="float32") as offloaded:
        generations = offloaded.generate(prompts, max_new_tokens=tokens, ignore_eos=True)
        sequences = [each.prompt_ids + each.token_ids for each in generations]
        starts = [len(each.prompt_ids) for each in generations]
        own = [each.token_ids for each in generations]
        _, experts = forced(offloaded, sequences, starts)
    print(f"{len(prompts)} prompts, {tokens} greedy tokens each, embedded model, float32:")
    for bits in BITS[1:]:
        with OffloadedModel.load("demo", CacheSize(fraction=1.0), device="cpu", dtype="float32", expert_bits=bits) as offloaded:
            likeliest, found = forced(offloaded, sequences, starts)
            free = [each.token_ids for each in offloaded.generate(prompts, max_new_tokens=tokens, ignore_eos=True)]
        equal = np.concatenate([np.equal(one, other) for one, other in zip(likeliest, own, strict=True)])
        shared = (found[..., :, None] == experts[..., None, :]).any(axis=-1)
        kept = np.mean([one == other for one, other in zip(free, own, strict=True)])
        print(
            f"  {bits} bits: {equal.mean():.3f} of the likeliest tokens are equal, {kept:.3f} of the continuations as a whole; "
            f"{shared.mean():.3f} of the experts, {shared.all(axis=(1, 2)).mean():.3f} of the tokens' paths"
        )


@torch.inference_mode()
def forced(
    offloaded: OffloadedModel, sequences: list[list[int]], starts: list[int]
) -> tuple[list[list[int]], npt.NDArray[np.int64]]:
    """The likeliest tokens of a model that reads given sequences, from `starts` on, and the experts `[N, L, K]` of the tokens
    that they follow."""
    likeliest, routed = [], []
    for sequence, start in zip(sequences, starts, strict=True):
        steps: list[npt.NDArray[np.int64]] = []

        def note(
            _step: ForwardPass,
            ids_NLK: npt.NDArray[np.int64],
            _weights: npt.NDArray[np.float32],
            found: list[npt.NDArray[np.int64]] = steps,
        ) -> None:
            found.append(ids_NLK)

        offloaded.experts.on_routed = note
        logits_TV = offloaded.model(torch.tensor([sequence])).logits[0]
        likeliest.append([int(token) for token in logits_TV[start - 1 : -1].argmax(-1)])
        routed.append(steps[0][start - 1 : -1])
    offloaded.experts.on_routed = None
    return likeliest, np.concatenate(routed)


def print_speed(model: Path, prompts: list[str], arguments: argparse.Namespace) -> None:
    """Run all rows with unpacked and packed experts, round by round."""
    plain = arguments.expert_mb * (0.5 if arguments.dtype != "float32" else 1.0)
    gigabytes = (8 * 3 + 2) * plain * 1.02 / 1e3
    rows = [
        Row("all cached", "ram", CacheSize(fraction=1.0)),
        Row("half cached", "ram", CacheSize(fraction=0.5)),
        Row(f"{gigabytes:.3g} GB cached", "ram", CacheSize(gigabytes=gigabytes)),
        Row(f"{gigabytes:.3g} GB cached, disk", "disk", CacheSize(gigabytes=gigabytes)),
    ]
    found: dict[tuple[str, int | None], list[Measured]] = {}
    for _ in range(arguments.rounds):
        for row in rows:
            for bits in BITS:
                found.setdefault((row.name, bits), []).append(run(model, prompts, row, bits, arguments))
    print(
        f"experts of {plain:g} MB in {arguments.dtype}, {arguments.rounds} rounds, {len(prompts)} x {arguments.tokens} tokens:"
    )
    print(f"{'':24}{'bits':>6}{'MB/expert':>11}{'slots':>7}{'hits':>7}{'MB/token':>10}{'CPU ms':>9}{'x CPU (all rounds)':>24}")
    for (name, bits), runs in found.items():
        ratios = [one.cpu_seconds / base.cpu_seconds for one, base in zip(runs, found[name, None], strict=True)]
        speeds = [base.seconds / one.seconds for one, base in zip(runs, found[name, None], strict=True)]
        print(
            f"{name:24}{bits or '-':>6}{runs[0].expert_megabytes:11.3f}{runs[0].capacity:7}{runs[0].hit_rate:7.3f}"
            f"{runs[0].megabytes_per_token:10.2f}{median(one.cpu_seconds for one in runs) * 1e3:9.1f}"
            f"{f'{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})':>24}"
            f"  x tokens/s {median(speeds):.2f} ({min(speeds):.2f}-{max(speeds):.2f})"
        )


def run(model: Path, prompts: list[str], row: Row, bits: int | None, arguments: argparse.Namespace) -> Measured:
    """One row, once."""
    # Models have cycles of references, and the last one's memory is needed.
    gc.collect()
    with OffloadedModel.load(
        str(model), row.cache, store=row.store, expert_bits=bits, dtype=arguments.dtype, device="cpu", direct=True
    ) as offloaded:
        # The first pass of a process allocates memory.
        offloaded.generate(prompts[:1], max_new_tokens=2, ignore_eos=True)
        decode = offloaded.experts.decode
        before = (decode.tokens, decode.hits, decode.requested, decode.bytes)
        began, cpu_began = time.perf_counter(), time.process_time()
        offloaded.generate(prompts, max_new_tokens=arguments.tokens, ignore_eos=True)
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
        after = (decode.tokens, decode.hits, decode.requested, decode.bytes)
        tokens, hits, requested, moved = (now - then for now, then in zip(after, before, strict=True))
        return Measured(
            offloaded.expert_bytes / 1e6 / (offloaded.shape.layers * offloaded.shape.experts),
            offloaded.capacity,
            hits / requested,
            moved / 1e6 / tokens,
            seconds / tokens,
            cpu_seconds / tokens,
        )


if __name__ == "__main__":
    main()
