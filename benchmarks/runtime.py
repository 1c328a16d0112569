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
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from profiler.datasets.problems import read_problems
from profiler.datasets.registry import DEMO_DATASETS, find_dataset
from profiler.models.resolve import demo_model_folder
from profiler.trace.reader import Trace
from speculation.data.routes import load_routes, problems_of_part
from speculation.data.tasks import Task
from speculation.offload.costs import Costs
from speculation.offload.plans import plan_of, ranked
from speculation.offload.policy_scores import scores_by_step, token_scores
from speculation.offload.requests import requests_of
from speculation.offload.simulation.simulate import Setting, Workload, simulate
from speculation.offload.state import Rule
from speculation.predictors.options import TrainingOptions
from speculation.runtime.memory import peak_memory
from speculation.runtime.model import OffloadedModel
from speculation.runtime.options import CacheSize
from speculation.runtime.recording import PromptSource
from speculation.runtime.slots import BUFFERS
from speculation.training.fit import train
from speculation.training.runs import load_run

PROMPTS = 3
DEMO_EXPERTS, DEMO_TOP_K = 8, 2
# Memory of a process without its experts.
OVERHEAD_GB = 0.7
# The predictors are trained on so many continuations of each prompt, of so many tokens at most.
SAMPLES, TRAIN_TOKENS = 4, 160
# Layers ahead that are predicted: where a transfer takes longer than a layer's computation, one is too late.
HORIZON = 3
ACCELERATE, PLAIN, RESIDENT, ON_DEMAND = "accelerate", "plain transformers", "everything cached", "on demand"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row. kind: `ACCELERATE`, `PLAIN`, or our runtime with the other fields. tokens: new tokens per prompt."""

    name: str
    kind: str = "runtime"
    fraction: float = 0.0
    policy: str = "lru"
    predictor: str | None = None
    threshold: float = 0.0
    prefetch: int | None = None
    device: str = "cpu"
    direct: bool = True
    tokens: int
    trace: str | None = None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a row measured. seconds: of generated tokens."""

    tokens: int
    seconds: float
    hit_rate: float | None
    megabytes_per_token: float | None
    stall: float | None
    memory_gb: float
    copy_seconds: float
    expert_seconds: float
    layer_seconds: float
    output: list[list[int]]
    notes: list[str]

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


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


def cases(tokens: int, prefetcher: Path | None, reuse: Path | None, trace: str) -> list[Case]:
    """All rows, the fastest last; those of trained predictors only if there are any."""
    rows = [
        Case(name=ON_DEMAND, tokens=tokens, trace=trace),
    ]
    for fraction in (0.25, 0.5):
        rows.append(Case(name=f"{fraction:.0%} {ACCELERATE}", kind=ACCELERATE, fraction=fraction, tokens=max(2, tokens // 4)))
        kinds: list[tuple[str, str, str | None]] = [
            ("lru", "lru", None),
            ("lru + next-gate", "lru", "next-gate"),
            ("ewma", "ewma", None),
        ]
        if prefetcher is not None and reuse is not None:
            kinds += [
                ("lru + predictor", "lru", str(prefetcher)),
                ("ewma + predictor", "ewma", str(prefetcher)),
                ("learned", str(reuse), None),
                ("learned + predictor", str(reuse), str(prefetcher)),
            ]
        rows += [
            Case(name=f"{fraction:.0%} {name}", fraction=fraction, policy=policy, predictor=predictor, tokens=tokens)
            for name, policy, predictor in kinds
        ]
        rows.append(Case(name=f"{fraction:.0%} lru, page cache", fraction=fraction, direct=False, tokens=tokens))
    rows.append(Case(name=PLAIN, kind=PLAIN, tokens=tokens))
    rows.append(Case(name=RESIDENT, fraction=1.0, tokens=tokens))
    return rows


def widen(folder: Path, expert_bytes: float, shape: tuple[int, int] | None) -> None:
    """Write the embedded model with wider experts, in float32, one file per layer.

    shape: E and K of a model with random routers and experts instead of the embedded ones; None for these.
    """
    source = demo_model_folder()
    tensors = {name: tensor.float() for name, tensor in load_file(source / "model.safetensors").items()}
    config = json.loads((source / "config.json").read_text())
    hidden, width = config["hidden_size"], config["intermediate_size"]
    wide = max(width, int(expert_bytes / (3 * hidden * 4)))
    if shape is not None:
        config |= {"num_local_experts": shape[0], "num_experts_per_tok": shape[1]}
        tensors = with_random_experts(tensors, config)
    unfinished = folder.with_suffix(".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    random = torch.Generator().manual_seed(0)
    where: dict[str, str] = {}
    for layer in range(config["num_hidden_layers"]):
        own = {name: tensor for name, tensor in tensors.items() if f".layers.{layer}." in name}
        for name, tensor in own.items():
            if ".experts." not in name:
                continue
            # silu(gate) * up is zero in the new columns, because up is.
            kind = name.split(".")[-2]
            rows = {"w1": (wide - width, hidden), "w3": (wide - width, hidden), "w2": (hidden, wide - width)}[kind]
            more = torch.zeros(rows) if kind == "w3" else torch.randn(rows, generator=random)
            own[name] = torch.cat([tensor, more], dim=1 if kind == "w2" else 0).contiguous()
        save_file(own, unfinished / f"layer-{layer}.safetensors", metadata={"format": "pt"})
        where |= dict.fromkeys(own, f"layer-{layer}.safetensors")
    rest = {name: tensor for name, tensor in tensors.items() if name not in where}
    save_file(rest, unfinished / "rest.safetensors", metadata={"format": "pt"})
    where |= dict.fromkeys(rest, "rest.safetensors")
    (unfinished / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (unfinished / "config.json").write_text(json.dumps(config | {"intermediate_size": wide, "dtype": "float32"}))
    for path in source.glob("*.json"):
        if path.name not in {"config.json", "training.json"}:
            shutil.copyfile(path, unfinished / path.name)
    os.sync()
    unfinished.rename(folder)


def with_random_experts(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of the embedded model with as many random experts as the config says, and routers to match."""
    random = torch.Generator().manual_seed(1)
    hidden, width = config["hidden_size"], config["intermediate_size"]
    found = {name: tensor for name, tensor in tensors.items() if ".block_sparse_moe." not in name}
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}.block_sparse_moe"
        found[f"{block}.gate.weight"] = torch.randn(config["num_local_experts"], hidden, generator=random)
        for expert in range(config["num_local_experts"]):
            for part, rows in (("w1", (width, hidden)), ("w3", (width, hidden)), ("w2", (hidden, width))):
                found[f"{block}.experts.{expert}.{part}.weight"] = torch.randn(rows, generator=random) * 0.05
    return found


def demo_trace(folder: Path) -> Trace:
    """A trace of all embedded prompts, each continued several times by the embedded model itself."""
    if not (folder / "manifest.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        problems = [problem for name in DEMO_DATASETS for problem in read_problems(find_dataset(name))]
        sources = [
            PromptSource(dataset=each.dataset, source_key=f"{each.source_key}-{sample}", prompt=each.prompt)
            for sample in range(SAMPLES)
            for each in problems
        ]
        with OffloadedModel.load("demo", CacheSize(fraction=1.0), device="cpu") as offloaded:
            prompts = [source.prompt or "" for source in sources]
            offloaded.generate(
                prompts, max_new_tokens=TRAIN_TOKENS, temperature=0.9, batch=len(problems), trace=folder, sources=sources
            )
    return Trace.open(folder)


def trained(trace: Trace, folder: Path, name: str, task: Task, horizon: int = 1) -> Path:
    """The directory of a run."""
    if not (folder / "config.json").is_file():
        train(trace, name, folder, task=task, horizon=horizon, options=TrainingOptions())
    return folder


def test_prompts(trace: Trace) -> list[str]:
    """Prompts that no predictor has been trained on, one for each dataset."""
    held_out = set(problems_of_part(trace, "test").tolist())
    found: dict[str, str] = {}
    for problem in trace.problems.to_pylist():
        if problem["problem_id"] in held_out:
            found.setdefault(problem["dataset"], problem["prompt"])
    return list(found.values())[:PROMPTS]


def in_process(case: Case, model: Path, prompts: list[str], memory_gb: float | None) -> Measured:
    """Run a row in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.runtime", "--child", json.dumps(asdict(case)), str(model), json.dumps(prompts)]
    with memory_limit(memory_gb) as group:
        environment = os.environ | ({"SPECMOE_BENCHMARK_GROUP": str(group)} if group else {})
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        why = "it was killed, which the limit of memory does" if done.returncode == -9 else done.stderr[-2000:]
        raise SystemExit(f"{case.name} failed: {why}")
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def drop_from_page_cache(folder: Path) -> None:
    """Make reads of a folder's files go to the disk."""
    os.sync()
    for path in folder.iterdir():
        with path.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def memory_limit(gigabytes: float | None) -> Iterator[Path | None]:
    """A control group whose processes may use so much memory, page cache included; version 1 or 2."""
    if gigabytes is None:
        yield None
        return
    root = Path("/sys/fs/cgroup")
    is_second = (root / "cgroup.controllers").is_file()
    group = (root if is_second else root / "memory") / f"specmoe-benchmark-{os.getpid()}"
    group.mkdir()
    try:
        (group / ("memory.max" if is_second else "memory.limit_in_bytes")).write_text(str(int(gigabytes * 1e9)))
        yield group
    finally:
        for _ in range(50):
            try:
                group.rmdir()
                break
            except OSError:
                # Its last process is still ending.
                time.sleep(0.1)


def run_case(case: Case, model: Path, prompts: list[str]) -> Measured:
    """Run one row in this process."""
    group = os.environ.get("SPECMOE_BENCHMARK_GROUP")
    if group:
        (Path(group) / "cgroup.procs").write_text(str(os.getpid()))
    torch.set_num_threads(max(1, (os.cpu_count() or 2) - 1))
    if case.kind == "runtime":
        return run_offloaded(case, model, prompts)
    return run_transformers(case, model, prompts)


def run_offloaded(case: Case, model: Path, prompts: list[str]) -> Measured:
    size = CacheSize(fraction=case.fraction)
    with OffloadedModel.load(
        str(model),
        size,
        store="disk" if case.device == "cpu" else "ram",
        policy=case.policy,
        predictor=case.predictor,
        threshold=case.threshold,
        prefetch=case.prefetch,
        device=case.device,
        dtype="float32",
        direct=case.direct,
    ) as offloaded:
        sources = [PromptSource(dataset="demo", source_key=str(n), prompt=prompt) for n, prompt in enumerate(prompts)]
        found = offloaded.generate(
            prompts,
            max_new_tokens=case.tokens,
            ignore_eos=True,
            trace=None if case.trace is None else Path(case.trace),
            sources=sources,
        )
        decode = offloaded.experts.decode
        layers = decode.tokens * offloaded.shape.layers
        return Measured(
            tokens=decode.tokens,
            seconds=decode.seconds,
            hit_rate=decode.hits / decode.requested,
            megabytes_per_token=decode.bytes / 1e6 / decode.tokens,
            stall=decode.stall / decode.seconds,
            memory_gb=peak_memory() / 1e9,
            copy_seconds=decode.transfer_seconds / max(1, decode.transfers),
            expert_seconds=decode.compute / decode.requested,
            layer_seconds=(decode.seconds - decode.stall - decode.compute) / layers,
            output=[each.token_ids for each in found],
            notes=offloaded.experts.notes,
        )


def run_transformers(case: Case, model: Path, prompts: list[str]) -> Measured:
    """Plain transformers, with all experts in memory or with accelerate's offload to disk."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    options: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=model.parent) as offload:
        device: Any = 0 if case.device == "cuda" else "cpu"
        if case.kind == ACCELERATE:
            layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
            names = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
            places = dict.fromkeys(names, device)
            for layer in range(layers):
                for part in ("self_attn", "input_layernorm", "post_attention_layernorm", "mlp.gate"):
                    places[f"model.layers.{layer}.{part}"] = device
                places[f"model.layers.{layer}.mlp.experts"] = "disk" if case.device == "cpu" else "cpu"
            options = {"device_map": places, "offload_folder": offload}
        elif case.device == "cuda":
            options = {"device_map": {"": 0}}
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **options).eval()
        loaded.set_experts_implementation("eager")
        tokens, seconds, output = 0, 0.0, []
        for prompt in prompts:
            ids_BT = torch.tensor([tokenizer(prompt)["input_ids"]], device=device)
            times: list[float] = []

            def note(_tokens: Any, _scores: Any, found: list[float] = times, **_: Any) -> torch.Tensor:
                found.append(time.perf_counter())
                return torch.zeros(1, dtype=torch.bool, device=device)

            with torch.inference_mode():
                done_BT = loaded.generate(
                    ids_BT, max_new_tokens=case.tokens, do_sample=False, eos_token_id=None, stopping_criteria=[note]
                )
            output.append([int(token) for token in done_BT[0, ids_BT.shape[1] :]])
            # From the first token, which the prompt's forward pass gives, to the last.
            tokens, seconds = tokens + len(times) - 1, seconds + times[-1] - times[0]
    return Measured(
        tokens=tokens,
        seconds=seconds,
        hit_rate=None,
        megabytes_per_token=None,
        stall=None,
        memory_gb=peak_memory() / 1e9,
        copy_seconds=0.0,
        expert_seconds=0.0,
        layer_seconds=0.0,
        output=output,
        notes=[],
    )


def check_output(row: Case, measured: dict[str, Measured]) -> None:
    """Stop if a row generated other tokens than the first one of our runtime."""
    reference = measured.get(ON_DEMAND)
    if reference is None:
        return
    for own, others in zip(measured[row.name].output, reference.output, strict=True):
        if own != others[: len(own)]:
            raise SystemExit(f"{row.name} generated other tokens than {ON_DEMAND}: {own} instead of {others[: len(own)]}")


class Simulator:
    """The simulation of the rows of our runtime, on the trace that one of them wrote."""

    def __init__(self, trace: Trace, experts: int) -> None:
        self._experts, self._routes = experts, load_routes(trace, "all")
        self._requests = requests_of(self._routes, experts)

    def tokens_per_second(self, row: Case, one: Measured, base: Measured) -> float | None:
        """What the simulation gives for a row; None where it cannot tell.

        Args:
            row: The row.
            one: What it measured: the means of its transfers and of its experts' computation are the costs.
            base: The row without a cache, whose rest of a layer has no predictions in it.
        """
        # The simulation cannot know what the routers choose for another layer's input.
        if row.kind != "runtime" or not row.direct or row.predictor == "next-gate" or row.device != "cpu" or row.fraction == 1:
            return None
        costs = Costs(
            model="demo",
            device="cpu",
            precision="float32",
            expert_bytes=1.0,
            copy_seconds=one.copy_seconds,
            expert_seconds=one.expert_seconds,
            token_seconds=0.0,
            layer_seconds=base.layer_seconds,
            layer_token_seconds=0.0,
            computes_on_arrival=True,
        )
        routes, requests, plan = self._routes, self._requests, None
        if row.predictor is not None:
            predictor = load_run(Path(row.predictor)).predictor
            plan = plan_of(ranked(predictor, routes, row.prefetch or requests.top_k, row.threshold), predictor.shape, requests)
        rule, scores = Rule.LRU, None
        if Path(row.policy).is_dir():
            rule, reuse = Rule.LEARNED, load_run(Path(row.policy)).predictor
            scores = scores_by_step(token_scores(reuse, routes), requests)
        elif row.policy != "lru":
            rule = Rule[row.policy.upper()]
        workload = Workload(requests, _ranks(row, requests.layers, self._experts))
        return simulate(workload, Setting(rule, int(row.fraction * self._experts)), plan, costs, scores).tokens_per_second


def _ranks(row: Case, layers: int, experts: int) -> Any:
    """What the cache of a row begins with: the popular experts of its predictor's training, or the lowest numbers."""
    run = next((path for path in (row.policy, row.predictor) if path is not None and Path(path).is_dir()), None)
    return (
        np.zeros((layers, experts)) if run is None else load_run(Path(run)).baselines["popularity"].arrays()["probability_LE"]
    )


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
