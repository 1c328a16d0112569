"""A table of loads for SGLang's `--init-expert-location`, with which it balances experts over GPUs.

Format: `compute_initial_expert_location_metadata` in `python/sglang/srt/eplb/expert_location.py` of sgl-project/sglang 0.5.23
(PyPI). A JSON file with `logical_count`, tokens by decoder layer and expert; SGLang's load balancer (EPLB) places and
replicates experts by it. Other keys are ignored.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from profiler.errors import UsageError
from profiler.exporters.content import Content
from profiler.trace.writer import write_text

NAME = "sglang"
ABOUT = "JSON for --init-expert-location: tokens by decoder layer and expert (logical_count), for load balancing over GPUs"
SCOPE = "none"
SUFFIX = ".json"
UNVERIFIED = "SGLang was not run; a test reads the file as its loader does"


def write(content: Content, out: Path) -> list[str]:
    """Write the table. Returns how to use it. Raises `SpecmoeError` if experts are ranked by weight."""
    if content.report.by != "tokens":
        raise UsageError("SGLang balances the number of tokens: export by tokens")
    table = content.of_all_layers(content.counts.tokens_LE)
    write_text(out, json.dumps({"logical_count": table.tolist(), "specmoe": content.report.model_dump()}) + "\n")
    return [f"SGLang: --init-expert-location {shlex.quote(str(out))}, with --ep-size and --ep-num-redundant-experts"]
