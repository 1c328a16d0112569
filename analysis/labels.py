"""How tokens are shown: the text of vocabulary ids, where the model's tokenizer is at hand."""

from __future__ import annotations

from pathlib import Path

from analysis.survey import Axes
from profiler.errors import SpecmoeError, first_line
from profiler.models import DEMO_MODEL, demo_model_folder

# Characters that a label has at most: a token of a stranger's trace may be a book.
LONGEST = 24
VISIBLE = {" ": "␣", "\n": "⏎", "\r": "⏎", "\t": "⇥"}


def token_labels(axes: Axes, model: str, tokenizer: str | None = None) -> list[str]:
    """A label for each token of `axes.vocabulary`: its text with blanks made visible, or `#id` where the text is unknown.

    model: the trace's. Its tokenizer is used if it is on this machine: nothing is downloaded on the word of a trace, and no
    code of a model is run. tokenizer: a folder or hub id to take instead. Raises `SpecmoeError` if that cannot be loaded.
    """
    numbers = [key for key in axes.vocabulary if isinstance(key, int)]
    texts = _texts(numbers, model, tokenizer) if numbers else {}
    return [_visible(key if isinstance(key, str) else texts.get(key, f"#{key}")) for key in axes.vocabulary]


def _texts(numbers: list[int], model: str, tokenizer: str | None) -> dict[int, str]:
    # Imported here: it takes seconds, and most traces are analysed where no tokenizer is.
    from transformers import AutoTokenizer

    if tokenizer is not None:
        name, only_here = tokenizer, False
    elif model == DEMO_MODEL:
        name, only_here = str(demo_model_folder()), True
    elif Path(model).exists():
        # What a trace calls its model must not choose a folder of this machine.
        return {}
    else:
        name, only_here = model, True
    try:
        loaded = AutoTokenizer.from_pretrained(name, local_files_only=only_here, trust_remote_code=False)
        return {number: loaded.decode([number]) for number in numbers if 0 <= number < len(loaded)}
    except Exception as error:
        if tokenizer is None:
            return {}
        raise SpecmoeError(f"--tokenizer {tokenizer}: no tokenizer could be loaded: {first_line(error)}") from error


def _visible(text: str) -> str:
    shown = "".join(VISIBLE.get(character, character if character.isprintable() else "·") for character in text)
    return (shown[: LONGEST - 1] + "…" if len(shown) > LONGEST else shown) or "(empty)"
