"""Keep numba from running code that it compiled from older files."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path


def recompile_after(file: str, *modules: str) -> None:
    """Have the compiled functions of a file compiled again if a module that they call is newer than the file.

    numba stores compiled code with the time of the function's own file. It does not notice that a function in another file,
    which is compiled into the first, has changed. So the file gets the time of the newest of them. Where it cannot be changed,
    as in an installation for all users, the files are only replaced together.

    Args:
        file: The caller's `__file__`. Call this before its first compiled function.
        modules: Full names of the imported modules that it calls.
    """
    own = Path(file)
    newest = max((Path(str(sys.modules[name].__file__)).stat().st_mtime_ns for name in modules), default=0)
    if own.stat().st_mtime_ns < newest:
        with contextlib.suppress(OSError):
            os.utime(own, ns=(newest, newest))
