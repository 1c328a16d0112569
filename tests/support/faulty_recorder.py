"""Runs jobs of `check` with recorders that copy wrongly, for `test_check`; prints the answers as JSON, one per fault.

python tests/support/faulty_recorder.py FOLDER FAMILY:FAULT...
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


def main() -> None:
    from vllm_patch.capture.buffers import CaptureBuffers
    from vllm_patch.check.jobs import EAGER, Job
    from vllm_patch.check.worker import answer_job

    right = CaptureBuffers.copy_of_layer

    def shifted(self: Any, position: int, output_scale: float = 1.0) -> Any:
        copy = right(self, position, output_scale)
        return lambda hidden, logits, weights, ids: copy(hidden, logits, weights.roll(1, 0), ids.roll(1, 0))

    def swapped(self: Any, position: int, output_scale: float = 1.0) -> Any:
        return right(self, {0: 1, 1: 0}.get(position, position), output_scale)

    def unnormalized(self: Any, position: int, output_scale: float = 1.0) -> Any:
        copy = right(self, position, output_scale)
        return lambda hidden, logits, weights, ids: copy(hidden, logits, logits.softmax(-1).gather(1, ids.long()), ids)

    def moved(self: Any, position: int, output_scale: float = 1.0) -> Any:
        copy = right(self, position, output_scale)
        return lambda *tensors: copy(*(tensor.roll(1, 0) for tensor in tensors))

    faults = {"none": right, "shifted": shifted, "swapped": swapped, "unnormalized": unnormalized, "moved": moved}
    for case in sys.argv[2:]:
        family, _, fault = case.partition(":")
        CaptureBuffers.copy_of_layer = faults[fault]  # type: ignore[method-assign]
        answer = answer_job(Job(model=family, mode=EAGER), Path(sys.argv[1]))
        print(json.dumps({"case": case, **answer}), flush=True)


if __name__ == "__main__":
    main()
