"""Make a 4-bit AWQ checkpoint of a mixture of experts with llmcompressor, its routers left as they are and checked to be so.

AutoAWQ, which made most public AWQ checkpoints, was archived in 2025; the vLLM project's llmcompressor took over its work. It
needs other versions of transformers than vLLM, so it has an environment of its own: `pip install 'speculative-moe[quantize]'`.

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
from profiler.errors import ModelError, SpecmoeError

# AWQ's search for scales: points on the grid of exponents.
GRID = 20
# Texts that are kept from calibration, to compare routing before and after.
HELD_OUT = 8
ROUTER = re.compile(r"\.(gate|router)\.weight$")
KEPT = [r"re:.*mlp\.gate$", r"re:.*shared_expert_gate$", "lm_head"]


@dataclass(frozen=True, kw_only=True)
class QuantizeReport:
    """What was made. agreement: share of the chosen experts that are the same before and after, on texts not calibrated with.

    packed, routers: how many weight matrices are in 4 bits, and how many routers there are, none of them among those.
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

    Of the form of Qwen2-MoE or OLMoE; DeepSeek-MoE v1 after `as_qwen2_moe`. Layers whose inputs are no
    multiple of the group stay as they are. Raises `ModelError` on other models and if the result is not what it should be.
    """
    # A bar for every layer's search makes thousands of lines where there is no terminal.
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
        raise ModelError(f"{len(texts)} texts to calibrate with: expected more than {HELD_OUT}")
    _spare_pinning()
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval()
    if model.config.model_type not in {"qwen2_moe", "olmoe"}:
        raise ModelError(f"{source} is {model.config.model_type}: expected qwen2_moe or olmoe")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoded = [list(tokenizer(text, truncation=True, max_length=max_tokens)["input_ids"]) for text in texts]
    # The two must not share texts; every so many of them, since texts come dataset by dataset.
    step = len(encoded) // HELD_OUT
    held_out = encoded[::step][:HELD_OUT]
    calibration = [tokens for number, tokens in enumerate(encoded) if number % step or number // step >= HELD_OUT]
    model.to(device)
    before = [_routes(model, tokens) for tokens in held_out]
    if device == "cuda":
        # llmcompressor brings one layer after the other to the GPU.
        model.to("cpu")
    odd = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module.in_features % group_size and "lm_head" not in name
    ]
    say(f"calibrating with {len(calibration)} texts of up to {max_tokens} tokens")
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=group_size)
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=Dataset.from_list([{"input_ids": tokens, "attention_mask": [1] * len(tokens)} for tokens in calibration]),
        recipe=[
            AWQModifier(mappings=_mappings(model), n_grid=GRID),
            QuantizationModifier(
                ignore=KEPT + odd,
                config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
            ),
        ],
        num_calibration_samples=len(calibration),
        max_seq_length=max_tokens,
        # Also those to which the router sends none of these tokens.
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
    """Weight matrices in 4 bits and routers of a checkpoint folder. Reads names and types only.

    Raises `ModelError` if a router is quantized, if there is none, or if no expert is quantized.
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
        raise ModelError(f"{folder}: the router {wrong[0]} is quantized: routes would not be the model's")
    if not routers:
        raise ModelError(f"{folder} has no routers")
    if not any(".experts." in name for name in packed):
        raise ModelError(f"{folder}: no expert is in 4 bits")
    return len(packed), len(routers)


def _mappings(model: Any) -> list[Any]:
    """Which layers share an input that AWQ scales.

    llmcompressor's own for Qwen2-MoE leave out the router, the shared expert and its gate, which read the same norm: their
    outputs would change with its scales. All readers of a norm are in here.
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


def _spare_pinning() -> None:
    """llmcompressor 0.14 pins memory for transfers to an accelerator even where there is none, and fails."""
    import torch
    from llmcompressor.pipelines.cache import IntermediatesCache

    if not torch.accelerator.is_available():
        IntermediatesCache._pin_intermediate = classmethod(lambda cls, intermediate: None)


app = typer.Typer(add_completion=False)


@app.command()
def main(
    source: Annotated[Path, typer.Argument(help="A checkpoint folder.")],
    target: Annotated[Path, typer.Argument(help="The folder to make.")],
    dataset: Annotated[str, typer.Option(help="Texts to calibrate with.")] = "wikitext-2,gsm8k,humaneval",
    data_files: Annotated[Path | None, typer.Option(help="A local file instead of the hub.")] = None,
    num_texts: Annotated[int, typer.Option(min=HELD_OUT + 1)] = 256,
    group_size: Annotated[int, typer.Option(min=1)] = 128,
) -> None:
    """Quantize a checkpoint to 4 bits."""
    try:
        texts = calibration_texts(dataset, num_texts, data_files, source)
        report = quantize(source, target, texts, group_size=group_size, say=typer.echo)
    except SpecmoeError as error:
        raise SystemExit(f"quantize: {error}") from None
    typer.echo(describe_report(target, report))


def calibration_texts(dataset: str, count: int, data_files: Path | None, source: Path) -> list[str]:
    """Prompts of datasets, spread evenly. Raises `DatasetError`."""
    names = tuple(name.strip() for name in dataset.split(","))
    selection = Selection(datasets=names, num_problems=count, data_files=data_files, sampling=Sampling())
    return [problem.prompt for problem in select(selection, str(source))]


def describe_report(target: Path, report: QuantizeReport) -> str:
    """The end of a quantization, for people."""
    return (
        f"{target}: {report.bytes / 1e9:.2f} GB, {report.packed} matrices in 4 bits, {report.routers} routers as they were; "
        f"{report.agreement:.1%} of the experts chosen on {report.tokens:,} held-out tokens are those of the original"
    )


if __name__ == "__main__":
    app()
