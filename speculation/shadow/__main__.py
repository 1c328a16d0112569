"""The scoring process: `python -m speculation.shadow ARGUMENTS`, with requests on standard input. Started by the engine."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from profiler.errors import SpecmoeError, missing_extra
from profiler.live.options import ShadowOptions


def main() -> None:
    """Score requests until the engine ends. An error is one line on standard error, which is the engine's log."""
    arguments = json.loads(sys.argv[1])
    options = ShadowOptions.of(arguments["options"])
    try:
        from speculation.shadow.process import run, yield_to_the_engine

        yield_to_the_engine(arguments["cores"])
        run(sys.stdin.buffer, options, Path(arguments["published"]))
    except ModuleNotFoundError as error:
        _end(missing_extra(error))
    except SpecmoeError as error:
        _end(str(error))


def _end(reason: str) -> None:
    print(f"specmoe: the predictor is not scored: {reason}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    main()
