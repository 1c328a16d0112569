"""Create an AWQ checkpoint on a rented GPU, in the cache Volume, where `modal_jobs/collect.py --precision awq` finds it.

    modal run modal_jobs/quantize.py --model qwen1.5-moe

The work is in `modal_jobs.awq`.
"""

# No `from __future__ import annotations` here, as in collect.py.

from pathlib import Path

import modal

from modal_jobs.awq import calibration_texts, describe_report, quantize
from modal_jobs.image import CACHE, cache_volume, cpu_image, quantize_image
from modal_jobs.running import one_line_errors, say
from modal_jobs.weights import fetch_checkpoint
from profiler.errors import ModelError, SpecmoeError, counted, first_line
from profiler.models.gpus import find_gpu
from profiler.models.registry import MODELS, QUANTIZE_PRECISION, quantized_checkpoint

app = modal.App("specmoe-quantize")


@app.function(image=cpu_image(), volumes={CACHE: cache_volume}, timeout=4 * 60 * 60, retries=2)
def fetch(model: str, revision: str | None) -> str:
    """Download the published weights into the cache. Returns an error message of one line, empty without an error."""
    try:
        fetch_checkpoint(model, revision, say=say)
    except SpecmoeError as error:
        return first_line(error)
    cache_volume.commit()
    return ""


@app.function(image=quantize_image(), gpu="A100-80GB", volumes={CACHE: cache_volume}, timeout=8 * 60 * 60, memory=128 * 1024)
def make(model: str, revision: str | None, name: str, texts: list[str], group_size: int) -> tuple[str, str]:
    """Quantize a model. Returns a description of the checkpoint and an error message of one line; one of them is empty."""
    from huggingface_hub import snapshot_download

    from profiler.models.deepseek_v1 import local_rewriting
    from profiler.models.resolve import resolve_model

    target = quantized_checkpoint(name, QUANTIZE_PRECISION)
    try:
        if target.is_dir():
            return f"{target} already exists", ""
        source = Path(snapshot_download(model, revision=revision, local_files_only=True))
        if resolve_model(str(source)).metadata.architecture == "DeepseekForCausalLM":
            source = local_rewriting(str(source), None, model.replace("/", "--"), say=say)
        target.parent.mkdir(parents=True, exist_ok=True)
        report = quantize(source, target, texts, group_size=group_size, say=say)
    except SpecmoeError as error:
        return "", first_line(error)
    cache_volume.commit()
    return describe_report(target, report), ""


@app.local_entrypoint()
def main(
    model: str,
    dataset: str = "wikitext-2,gsm8k,humaneval",
    data_files: str | None = None,
    num_texts: int = 256,
    group_size: int = 128,
    revision: str | None = None,
    gpu: str = "A100-80GB",
) -> None:
    """Quantize a model of the registry, or a hub id of a Qwen2-MoE, OLMoE or DeepSeek-MoE v1 model."""
    with one_line_errors("quantize"):
        find_gpu(gpu, rented=True)
        entry = MODELS.get(model)
        if entry is not None and QUANTIZE_PRECISION not in entry.quantizable:
            raise ModelError(f"{model} has the precisions {', '.join(entry.precisions)}: there is nothing to quantize")
        if entry is None and "/" not in model:
            raise ModelError(f"unknown model {model!r}: expected one of {', '.join(MODELS)}, or a hub id like org/name")
        repository = next(iter(entry.checkpoints.values())) if entry else model
        texts = calibration_texts(dataset, num_texts, Path(data_files) if data_files else None, Path(repository))
        print(f"{repository} to 4 bits with {counted(len(texts), 'text')} of {dataset}, on {gpu}", flush=True)
        refusal = fetch.remote(repository, revision)
        description = ""
        if not refusal:
            description, refusal = make.with_options(gpu=gpu).remote(repository, revision, model, texts, group_size)
        if refusal:
            raise ModelError(refusal)
        print(description)
        print(
            f"collect with it: modal run modal_jobs/collect.py --model {model} --precision {QUANTIZE_PRECISION} --dataset ..."
        )
