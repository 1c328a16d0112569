"""Activation counts for KTransformers' placement of experts on the GPU.

Format: `_init_kt_gpu_experts_masks` in `sglang/srt/layers/moe/kt_ep_wrapper.py` of sglang-kt 0.7.2 (PyPI; kvcache-ai/sglang),
and `generate_gpu_experts_masks` of kt-kernel 0.7.2. With `--kt-expert-placement-strategy frequency`, the file of
`--init-expert-location` must end in `.pt`: `torch.load(weights_only=True)` of a dictionary with `logical_count`, a tensor
`[buffers, decoder layers, experts]`, summed over buffers. The experts with the highest counts of all layers go to the GPU.
KTransformers reads no other kind of file here, so this one is written by `torch.save`, of a plain tensor.
"""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np

from profiler.exporters.content import Content
from profiler.trace.writer import temporary_of

NAME = "ktransformers"
ABOUT = "torch file for --kt-expert-placement-strategy frequency: tokens by decoder layer and expert; ranks all layers together"
SCOPE = "global"
SUFFIX = ".pt"
UNVERIFIED = "KTransformers was not run; a test reads the file as its loader does"


def write(content: Content, out: Path) -> list[str]:
    """Write the counts. Returns how to use them."""
    import torch

    table = torch.from_numpy(np.ascontiguousarray(content.of_all_layers(content.score_LE)[None]))
    # Given a path, torch.save stores the name of the temporary file, too.
    with temporary_of(out) as temporary, temporary.open("wb") as file:
        torch.save({"logical_count": table}, file)
    kept, layers = int(content.kept_LE.sum()), len(content.kept_LE)
    # The engine rounds the product of ratio and experts down.
    count = (
        f"--kt-num-gpu-experts {kept // layers}"
        if kept % layers == 0
        else f"--kt-gpu-experts-ratio {(kept + 0.5) / content.kept_LE.size:.7f}"
    )
    place = f"--init-expert-location {shlex.quote(str(out))}"
    return [f"KTransformers: --kt-expert-placement-strategy frequency {place} {count}"]
