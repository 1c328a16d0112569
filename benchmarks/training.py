"""Training throughput: batches built from whole routes, compared with a per-sample DataLoader, for the same networks.

    python -m benchmarks.training [--trace DIR] [--seconds S]

The DataLoader loop is what a first version would do: a Dataset whose `__getitem__` computes the inputs and the target of one
sample, joined by the default collate function, without workers and with two. A sample is either one prediction (a token at a
layer) or one token with all its layers. Both use this project's features and networks, which compute all layers of a token. A
sample that is one prediction needs only one of these layers, so the benchmark also prints a lower bound of the slowdown: what
it would be if the network took no time. A token counts when all its layers are done. Tokens per second are medians of three
rounds that alternate within one run.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from profiler.trace.reader import Trace
from speculation.data.routes import Routes, load_routes
from speculation.data.tasks import Shape
from speculation.predictors.features import frequent_tokens
from speculation.predictors.neural.base import NeuralPredictor, mean_cross_entropy
from speculation.predictors.neural.training_loop import best_precision
from speculation.predictors.registry import find_predictor

NAMES = ("recommended-small", "recommended", "mlp", "statistics-aware")
ROUNDS = 3
LOADERS = ("a prediction a sample", "a prediction a sample, 2 workers", "a token a sample", "a token a sample, 2 workers")


class Tokens(Dataset[dict[str, Any]]):
    """One token per item: the network's inputs and target, without the batch dimension."""

    def __init__(self, predictor: NeuralPredictor, routes: Routes) -> None:
        self.predictor, self.routes = predictor, routes

    def __len__(self) -> int:
        return len(self.routes)

    def __getitem__(self, token: int) -> dict[str, Any]:
        tokens_T = np.array([token])
        true_TLHE, is_valid_TLH = self.predictor.truth(self.routes, tokens_T)
        arrays = {name: array[0] for name, array in self.predictor.inputs(self.routes, tokens_T).items()}
        return arrays | {"true": true_TLHE[0], "is_valid": is_valid_TLH[0]}


class Predictions(Dataset[dict[str, Any]]):
    """One token at one layer per item: the network's inputs for the token, the layer, and the target at the next layer."""

    def __init__(self, predictor: NeuralPredictor, routes: Routes) -> None:
        self.predictor, self.routes = predictor, routes
        # There is nothing to predict after the last layer.
        self.layers = predictor.shape.layers - 1

    def __len__(self) -> int:
        return len(self.routes) * self.layers

    def __getitem__(self, sample: int) -> dict[str, Any]:
        token, layer = divmod(sample, self.layers)
        tokens_T = np.array([token])
        true_E = np.zeros(self.predictor.shape.experts, dtype=np.float32)
        true_E[self.routes.expert_ids_TLK[token, layer + 1]] = 1.0
        arrays = {name: array[0] for name, array in self.predictor.inputs(self.routes, tokens_T).items()}
        return arrays | {"layer": layer, "true": true_E}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="default: a synthetic trace of gpt-oss-20b's shape")
    parser.add_argument("--seconds", type=float, default=4.0, help="duration of each measurement")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trace = Trace.open(arguments.trace) if arguments.trace else synthetic_trace(Path(folder))
        routes = load_routes(trace, "all")
        shape = Shape.of(trace.metadata.model, 1)
        print(f"{trace.path.name}: {len(routes):,} tokens, {shape}; {torch.get_num_threads()} threads")
        for name in NAMES:
            measure(name, routes, shape, arguments.seconds)


def synthetic_trace(folder: Path) -> Trace:
    """A trace of 40,000 tokens with random routing."""
    from benchmarks.analysis_memory import Case, write_synthetic_trace

    return Trace.open(write_synthetic_trace(folder / "synthetic", Case(24, 32, 4, 100, 400)))


def measure(name: str, routes: Routes, shape: Shape, seconds: float) -> None:
    cls = find_predictor(name)
    assert issubclass(cls, NeuralPredictor)
    predictor = cls(shape, frequent_tokens(routes, cls.max_vocabulary, min_count=2))
    size = cls.defaults.batch_tokens
    found: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        for what, batches in sources(predictor, routes, size).items():
            # A sample with one layer is a fraction of a token.
            tokens = size / (shape.layers - 1) if "prediction" in what else size
            found.setdefault(f"{what}, batches", []).append(speed(batches, tokens, seconds, lambda batch: None))
            found.setdefault(f"{what}, training", []).append(speed(batches, tokens, seconds, trainer(predictor)))
    rates = {what: median(values) for what, values in found.items()}
    print(f"\n{name}, batches of {size} tokens")
    for part in ("batches", "training"):
        ours = rates[f"whole routes, {part}"]
        print(f"  {part}: whole routes {ours:,.0f} tokens/s")
        for what in LOADERS:
            rate = rates[f"{what}, {part}"]
            bound = ours / rates[f"{what}, batches"]
            least = f", at least {bound:.1f} x" if part == "training" and "prediction" in what else ""
            print(f"  {part}: {what} {rate:,.0f} tokens/s, {ours / rate:.1f} x slower{least}", flush=True)


Batches = Callable[[], Iterator[dict[str, Any]]]


def sources(predictor: NeuralPredictor, routes: Routes, size: int) -> dict[str, Batches]:
    def whole() -> Iterator[dict[str, Any]]:
        order = np.random.default_rng(0).permutation(len(routes))
        for start in range(0, len(routes) - size, size):
            tokens_T = order[start : start + size]
            true_TLHE, is_valid_TLH = predictor.truth(routes, tokens_T)
            yield predictor.tensors(routes, tokens_T) | {"true": true_TLHE, "is_valid": is_valid_TLH}

    def loader(dataset: Dataset[dict[str, Any]], workers: int) -> Batches:
        return lambda: iter(DataLoader(dataset, batch_size=size, shuffle=True, num_workers=workers))

    datasets = (Predictions(predictor, routes), Tokens(predictor, routes))
    loaders = [loader(dataset, workers) for dataset in datasets for workers in (0, 2)]
    return {"whole routes": whole, **dict(zip(LOADERS, loaders, strict=True))}


def trainer(predictor: NeuralPredictor) -> Callable[[dict[str, Any]], None]:
    optimizer = torch.optim.AdamW(predictor.network.parameters(), lr=1e-3)
    predictor.network.train()
    is_bf16 = best_precision() == "bf16"

    def step(batch: dict[str, Any]) -> None:
        inputs = {name: value for name, value in batch.items() if name not in {"true", "is_valid", "layer"}}
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
            logits = predictor.network(**inputs)
            if "layer" in batch:
                logits_BE = logits[torch.arange(len(logits)), batch["layer"], 0].float()
                loss = torch.nn.functional.binary_cross_entropy_with_logits(logits_BE, batch["true"])
            else:
                loss = mean_cross_entropy(logits, batch["true"], batch["is_valid"])
        loss.backward()  # type: ignore[no-untyped-call] # PyTorch leaves it without annotations
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def speed(batches: Batches, tokens: float, seconds: float, use: Callable[[dict[str, Any]], None]) -> float:
    """Tokens per second, for batches of `tokens` tokens. The first batch is not timed, because it starts the workers."""
    source = batches()
    use(next(source))
    began, done = time.perf_counter(), 0.0
    for batch in source:
        use(batch)
        done += tokens
        if time.perf_counter() - began > seconds:
            break
    return done / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
