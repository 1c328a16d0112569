"""Write the checkpoints of the named families, or of all, into a folder."""

from __future__ import annotations

import sys
from pathlib import Path

from vllm_patch.check.families import FAMILIES, make

for family in sys.argv[2:] or (*FAMILIES, "deepseek_v1"):
    print(make(family, Path(sys.argv[1])), flush=True)
