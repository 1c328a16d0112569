"""The `specmoe` command: sub-commands of `profiler`, `analysis` and `speculation`, and how errors reach the terminal."""

from __future__ import annotations

import sys

import typer

import profiler.cli
from profiler.errors import SpecmoeError

app = typer.Typer(
    help="Record how mixture-of-experts models route tokens, analyse it, and learn to predict it.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(profiler.cli.app)


def main() -> None:
    """Exit 0 on success, 2 on wrong usage, 1 with one clear line on anything else that a user can meet."""
    command = typer.main.get_command(app)
    try:
        result = command.main(args=sys.argv[1:] or ["--help"], standalone_mode=False)
    except typer.TyperException as error:
        _fail(error.format_message(), error.exit_code)
    except (SpecmoeError, OSError) as error:
        _fail(str(error), 1)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", 130)
    else:
        sys.exit(result if isinstance(result, int) else 0)


def _fail(text: str, code: int) -> None:
    print(f"specmoe: {' '.join(text.split())}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
