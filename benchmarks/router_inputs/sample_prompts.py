"""Continue the demo's prompts several times with the embedded model, and record routing and router inputs of all layers.

    python -m benchmarks.router_inputs.sample_prompts --out DIR [--texts 4] [--new-tokens 352]

Every text is sampled at temperature 1, with vLLM on this machine. Generation does not stop at the end of a document: the model
then begins another one of the same kind, as in its training. Writes the traces DIR/seed-0, DIR/seed-1, ...; finished ones are
kept. This is a program of its own, because vLLM's processes import the program that starts them, and those of vLLM 0.32 for
CPUs do not start if it imports numba.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from profiler.capture.options import CaptureOptions
from profiler.collect.collection import Collection
from profiler.collect.collector import TraceCollector
from profiler.collect.selection import Selection, describe, select
from profiler.datasets.registry import DEMO_DATASETS
from profiler.engines import EngineOptions, Sampling
from profiler.models.resolve import DEMO_MODEL, resolve_model
from profiler.trace.schema import MANIFEST_FILE

PROMPTS, TEXTS, NEW_TOKENS = 120, 4, 352
# No text is longer: the model's own limit.
MAX_TEXT = 1024
# So few sequences that all their prompts fit into a step: vLLM 0.32 for CPUs fails where it reads a prompt in pieces and
# samples with a seed.
BATCH = 24


def sample_prompts(out: Path, *, texts: int, new_tokens: int, prompts: int) -> None:
    """Continue every prompt `texts` times, each time with another seed.

    Args:
        out: The folder of the traces.
        texts: How many texts continue each prompt.
        new_tokens: Tokens to generate for each text.
        prompts: Total number of prompts, spread evenly over the domains.

    Raises:
        SpecmoeError: vLLM is not installed or fails, or a folder in `out` has a trace of other settings.
    """
    layers = tuple(resolve_model(DEMO_MODEL).metadata.moe_layers)
    budget = prompts * MAX_TEXT
    options = EngineOptions(batch=BATCH, capture=CaptureOptions(hidden_layers=layers, hidden_tokens=budget))
    with TraceCollector(DEMO_MODEL, engine_options=options, on_stage=lambda text: print(text, flush=True)) as collector:
        for seed in range(texts):
            folder = out / f"seed-{seed}"
            if (folder / MANIFEST_FILE).is_file():
                continue
            sampling = Sampling(max_new_tokens=new_tokens, temperature=1.0, seed=seed, ignore_eos=True)
            selection = Selection(datasets=DEMO_DATASETS, num_problems=prompts, sampling=sampling)
            problems = select(selection, collector.model.location)
            collector.collect(Collection(out=folder, hidden_tokens=budget, resume=True, **describe(selection, problems)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    add_arguments(parser)
    arguments = parser.parse_args()
    sample_prompts(arguments.out, texts=arguments.texts, new_tokens=arguments.new_tokens, prompts=arguments.prompts)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that say which texts are sampled."""
    parser.add_argument("--texts", type=int, default=TEXTS, help=f"texts that continue each prompt (default: {TEXTS})")
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS, help=f"of each text (default: {NEW_TOKENS})")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help=f"over all domains (default: {PROMPTS}, all there are)")


if __name__ == "__main__":
    main()
