"""A process that has everything imported and forks a collector for every line of JSON options on its standard input.

Starting Python with PyTorch takes seconds; a fork is there at once, so that kills hit the collection and not the imports.
Answers each line with the child's process id, and then with its exit code.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

import torch
import transformers.models.mixtral.modeling_mixtral

from profiler.collect.job import collect
from profiler.collect.options import LocalOptions
from profiler.engines import transformers as engine

assert transformers.models.mixtral
assert engine


def main() -> None:
    for line in sys.stdin:
        settings = json.loads(line)
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            try:
                collect(
                    LocalOptions(
                        model="demo",
                        dataset="demo-math,demo-code,demo-reviews",
                        out=Path(settings["out"]),
                        num_problems=settings["problems"],
                        engine="transformers",
                        max_new_tokens=settings["new_tokens"],
                        dtype="float32",
                        resume=settings["resume"],
                    )
                )
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
