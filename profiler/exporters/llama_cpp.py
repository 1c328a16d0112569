r"""Arguments for llama.cpp: which layers' experts stay on the CPU.

Format: `common/arg.cpp`, `common/common.h` and `src/llama-model-loader.cpp` of ggml-org/llama.cpp, as vendored by
llama-cpp-python 0.3.36. All experts of a layer and projection are one tensor (`blk.3.ffn_up_exps`), so only whole layers can be
moved. `--n-cpu-moe N` keeps those of the first N layers on the CPU. `--override-tensor` takes `REGEX=BUFFER` pairs that are
separated by commas; the loader searches each tensor's name for the regular expression, and the first match decides.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from profiler.errors import printable
from profiler.exporters.content import Content
from profiler.trace.writer import write_text

NAME = "llama-cpp"
ABOUT = "arguments --override-tensor and --n-cpu-moe: whole layers, since llama.cpp keeps a layer's experts in one tensor"
SCOPE = "layers"
SUFFIX = ".txt"
UNVERIFIED = "llama.cpp was not run; the arguments follow its parser"
# As common/common.h has it: the tensors of all experts of a layer.
EXPERT_TENSORS = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps"


def write(content: Content, out: Path) -> list[str]:
    """Write both kinds of arguments, with comments. Returns how to use them."""
    kept_L: npt.NDArray[np.bool_] = content.kept_LE[:, 0]
    on_cpu = [layer for layer, kept in zip(content.model.moe_layers, kept_L.tolist(), strict=True) if not kept]
    first_kept = content.model.moe_layers[-int(kept_L.sum())] if kept_L.any() else content.model.moe_layers[-1] + 1
    lines = [
        # Names of a trace are untrusted: a line break in one would begin an argument.
        f"# {printable(line)}"
        for line in (f"{content.report.model}, from the trace {content.report.trace}", *content.report.lines())
    ]
    lines += ["# The same number of layers, the last ones:", f"--n-cpu-moe {first_kept if on_cpu else 0}"]
    lines.append(f"# The layers that read the most distinct experts per step of {content.batch}:")
    lines.append(override(on_cpu) if on_cpu else "# all experts fit: no argument is needed")
    write_text(out, "\n".join(lines) + "\n")
    return [f"llama.cpp: add one of the two arguments in {out.name} to --n-gpu-layers all"]


def override(layers: list[int]) -> str:
    """The argument that keeps the experts of these layers on the CPU, quoted for a shell."""
    return f"--override-tensor 'blk\\.({'|'.join(map(str, layers))}){EXPERT_TENSORS}=CPU'"
