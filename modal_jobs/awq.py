"""Quantize a mixture-of-experts checkpoint to 4-bit AWQ with llmcompressor. Routers stay unquantized, which is verified.

AutoAWQ, which made most public AWQ checkpoints, was archived in 2025; the vLLM project's llmcompressor is its successor. It
needs other versions of transformers than vLLM, so it needs a separate environment: `pip install 'speculative-moe[quantize]'`.

    python -m modal_jobs.awq SOURCE TARGET --dataset demo-math,demo-code

`modal run modal_jobs/quantize.py` runs the same function on a rented GPU.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from profiler.collect.selection import Selection, select
from profiler.engines import Sampling
from profiler.errors import ModelError, SpecmoeError, counted

# Points on the grid of exponents in AWQ's search for scales.
GRID = 20
# Texts that are held out from calibration, to compare routing before and after.
HELD_OUT = 8
ROUTER = re.compile(r"\.(gate|router)\.weight$")
UNQUANTIZED = [r"re:.*mlp\.gate$", r"re:.*shared_expert_gate$", "lm_head"]


@dataclass(frozen=True, kw_only=True)
class QuantizeReport:
    """The result of a quantization.

    packed: number of weight matrices in 4 bits. routers: number of routers, none of which is quantized. bytes: size of the
    checkpoint. agreement: share of selected experts that are the same before and after, on held-out texts of `tokens` tokens.
    """

    packed: int
    routers: int
    bytes: int
    agreement: float
    tokens: int


def quantize(
    source: Path,
    target: Path,
    texts: list[str],
    *,
    group_size: int = 128,
    max_tokens: int = 512,
    say: Callable[[str], None] = lambda text: None,
) -> QuantizeReport:
    """Quantize the checkpoint folder `source` into `target`: symmetric, 4 bits, one scale for `group_size` inputs.

    The model must be a Qwen2-MoE or OLMoE; a DeepSeek-MoE v1 must first be converted with `as_qwen2_moe`. Layers whose number
    of inputs is not a multiple of the group size stay unquantized. Raises `ModelError` for other models, or if the result fails
    `check_checkpoint`.

    texts: calibration and held-out texts, more than `HELD_OUT`. max_tokens: texts are truncated to this. say: reports progress.
    """
    # Without a terminal, a progress bar for every layer's search prints thousands of lines.
    os.environ.setdefault("TQDM_DISABLE", "1")
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if target.exists():
        raise ModelError(f"{target} exists: delete it first")
    if len(texts) <= HELD_OUT:
        raise ModelError(f"{len(texts)} texts for calibration: expected more than {HELD_OUT}")
    _disable_pinning_on_cpu()
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval()
    if model.config.model_type not in {"qwen2_moe", "olmoe"}:
        raise ModelError(f"{source} is {model.config.model_type}: expected qwen2_moe or olmoe")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoded = [list(tokenizer(text, truncation=True, max_length=max_tokens)["input_ids"]) for text in texts]
    # The two sets must not share texts. Held-out texts are evenly spaced, because texts are ordered by dataset.
    step = len(encoded) // HELD_OUT
    held_out = encoded[::step][:HELD_OUT]
    calibration = [tokens for number, tokens in enumerate(encoded) if number % step or number // step >= HELD_OUT]
    model.to(device)
    before = [_routes(model, tokens) for tokens in held_out]
    if device == "cuda":
        # llmcompressor moves one layer at a time to the GPU.
        model.to("cpu")
    indivisible = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module.in_features % group_size and "lm_head" not in name
    ]
    say(f"calibrating with {counted(len(calibration), 'text')} of up to {max_tokens} tokens")
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=group_size)
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=Dataset.from_list([{"input_ids": tokens, "attention_mask": [1] * len(tokens)} for tokens in calibration]),
        recipe=[
            AWQModifier(mappings=_mappings(model), n_grid=GRID),
            QuantizationModifier(
                ignore=UNQUANTIZED + indivisible,
                config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
            ),
        ],
        num_calibration_samples=len(calibration),
        max_seq_length=max_tokens,
        # Otherwise, experts to which the router sends no calibration token would not be calibrated.
        moe_calibrate_all_experts=True,
    )
    model.to(device)
    after = [_routes(model, tokens) for tokens in held_out]
    building = target.with_name(target.name + ".part")
    shutil.rmtree(building, ignore_errors=True)
    model.save_pretrained(building, save_compressed=True)
    tokenizer.save_pretrained(building)
    packed, routers = check_checkpoint(building)
    building.rename(target)
    return QuantizeReport(
        packed=packed,
        routers=routers,
        bytes=sum(path.stat().st_size for path in target.iterdir()),
        agreement=_agreement(before, after),
        tokens=sum(len(tokens) for tokens in held_out),
    )


def check_checkpoint(folder: Path) -> tuple[int, int]:
    """The numbers of 4-bit weight matrices and of routers in a checkpoint folder. Reads tensor names and types only.

    Raises `ModelError` if a router is quantized, if the checkpoint has no routers, or if no expert is quantized.
    """
    from safetensors import safe_open

    types: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            types |= {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - no mapping
    routers = {name: kind for name, kind in types.items() if ROUTER.search(name)}
    packed = [name for name in types if name.endswith(".weight_packed")]
    wrong = [name for name, kind in routers.items() if kind not in {"BF16", "F16", "F32"}]
    wrong += [name for name in packed if ROUTER.search(name.replace(".weight_packed", ".weight"))]
    if wrong:
        raise ModelError(f"{folder}: the router {wrong[0]} is quantized, so routes would differ from the model's")
    if not routers:
        raise ModelError(f"{folder} has no routers")
    if not any(".experts." in name for name in packed):
        raise ModelError(f"{folder}: no expert is in 4 bits")
    return len(packed), len(routers)


def _mappings(model: Any) -> list[Any]:
    """The groups of layers that share an input, which AWQ scales.

    llmcompressor's own mappings for Qwen2-MoE omit the router, the shared expert and its gate. These read the same norm, so
    AWQ's scales would change their outputs. The mappings here include every reader of a norm.
    """
    from llmcompressor.modifiers.transform.awq import AWQMapping

    names = [name for name, _ in model.named_modules()]
    dense = sorted(getattr(model.config, "mlp_only_layers", None) or [])
    sparse = [layer for layer in range(model.config.num_hidden_layers) if layer not in dense]
    mappings = [AWQMapping(r"re:.*input_layernorm$", [r"re:.*q_proj$", r"re:.*k_proj$", r"re:.*v_proj$"])]
    if model.config.num_key_value_heads == model.config.num_attention_heads:
        mappings.append(AWQMapping(r"re:.*v_proj$", [r"re:.*o_proj$"]))
    readers = [r"re:.*mlp\.gate$", r"re:.*mlp\.experts\.\d+\.gate_proj$", r"re:.*mlp\.experts\.\d+\.up_proj$"]
    if any(name.endswith(".shared_expert") for name in names):
        readers += [r"re:.*shared_expert\.gate_proj$", r"re:.*shared_expert\.up_proj$", r"re:.*shared_expert_gate$"]
    mappings.append(AWQMapping(_norms(sparse), readers))
    if dense:
        mappings.append(AWQMapping(_norms(dense), [r"re:.*mlp\.gate_proj$", r"re:.*mlp\.up_proj$"]))
    return [*mappings, AWQMapping(r"re:.*up_proj$", [r"re:.*down_proj$"])]


def _norms(layers: list[int]) -> str:
    return rf"re:.*layers\.({'|'.join(map(str, layers))})\.post_attention_layernorm$"


def _routes(model: Any, tokens: list[int]) -> Any:
    from profiler.engines.transformers import route

    return np.sort(route(model, tokens)[0], axis=-1)


def _agreement(before: list[Any], after: list[Any]) -> float:
    shared = total = 0
    for old_TLK, new_TLK in zip(before, after, strict=True):
        shared += int((old_TLK[..., :, None] == new_TLK[..., None, :]).sum())
        total += old_TLK.size
    return shared / total


def _disable_pinning_on_cpu() -> None:
    """Work around llmcompressor 0.14, which pins memory even without an accelerator, and fails."""
    import torch
    from llmcompressor.pipelines.cache import IntermediatesCache

    if not torch.accelerator.is_available():
        IntermediatesCache._pin_intermediate = classmethod(lambda cls, intermediate: None)


app = typer.Typer(add_completion=False)


@app.command()
def main(
    source: Annotated[Path, typer.Argument(help="A checkpoint folder.")],
    target: Annotated[Path, typer.Argument(help="The folder to create.")],
    dataset: Annotated[str, typer.Option(help="Datasets for calibration, comma-separated.")] = "wikitext-2,gsm8k,humaneval",
    data_files: Annotated[Path | None, typer.Option(help="A local file to read instead of the hub.")] = None,
    num_texts: Annotated[int, typer.Option(min=HELD_OUT + 1, help="Number of texts.")] = 256,
    group_size: Annotated[int, typer.Option(min=1, help="Number of inputs that share a scale.")] = 128,
) -> None:
    """Quantize a checkpoint to 4 bits."""
    try:
        texts = calibration_texts(dataset, num_texts, data_files, source)
        report = quantize(source, target, texts, group_size=group_size, say=typer.echo)
    except SpecmoeError as error:
        raise SystemExit(f"quantize: {error}") from None
    typer.echo(describe_report(target, report))


def calibration_texts(dataset: str, count: int, data_files: Path | None, source: Path) -> list[str]:
    """Prompts for calibration, taken evenly from comma-separated datasets. Raises `DatasetError`."""
    names = tuple(name.strip() for name in dataset.split(","))
    selection = Selection(datasets=names, num_problems=count, data_files=data_files, sampling=Sampling())
    return [problem.prompt for problem in select(selection, str(source)) if problem.unusable is None]


def describe_report(target: Path, report: QuantizeReport) -> str:
    """The report as text, for the terminal."""
    return (
        f"{target}: {report.bytes / 1e9:.2f} GB, {report.packed} matrices in 4 bits, {report.routers} unquantized routers; "
        f"{report.agreement:.1%} of the experts selected on {report.tokens:,} held-out tokens are the original model's"
    )


if __name__ == "__main__":
    app()
