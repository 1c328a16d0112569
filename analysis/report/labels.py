"""How tokens are shown: the text of vocabulary ids, where the model's tokenizer is at hand."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from tokenizers import Tokenizer

from analysis.counts.survey import Axes
from profiler.errors import SpecmoeError, first_line
from profiler.models.resolve import DEMO_MODEL, demo_model_folder

# Characters that a label has at most: a token of a stranger's trace may be a book.
LONGEST = 24
TOKENIZER_FILE = "tokenizer.json"
MAX_TOKENIZER_BYTES = 256 << 20
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
    file = _tokenizer_file(model, tokenizer)
    if file is None:
        return {}
    try:
        if file.stat().st_size > MAX_TOKENIZER_BYTES:
            raise SpecmoeError(f"{file} is larger than {MAX_TOKENIZER_BYTES >> 20} MiB: no tokenizer")
        loaded = Tokenizer.from_file(str(file))
    # The library raises plain `Exception`.
    except Exception as error:
        if tokenizer is None:
            return {}
        raise SpecmoeError(f"--tokenizer {tokenizer}: no tokenizer could be loaded: {first_line(error)}") from error
    size = loaded.get_vocab_size()
    return {number: loaded.decode([number], skip_special_tokens=False) for number in numbers if 0 <= number < size}


def _tokenizer_file(model: str, tokenizer: str | None) -> Path | None:
    """The model's `tokenizer.json` if it is on this machine; that of `tokenizer` in any case."""
    if tokenizer is not None:
        if Path(tokenizer).is_dir():
            return Path(tokenizer) / TOKENIZER_FILE
        try:
            return Path(hf_hub_download(tokenizer, TOKENIZER_FILE))
        except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
            raise SpecmoeError(f"--tokenizer {tokenizer}: no folder, and not on the hub: {first_line(error)}") from error
    if model == DEMO_MODEL:
        return demo_model_folder() / TOKENIZER_FILE
    try:
        # A name that is none of the hub's, such as a folder, is refused: what a trace says must not choose a file here.
        found = try_to_load_from_cache(model, TOKENIZER_FILE)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _visible(text: str) -> str:
    shown = "".join(VISIBLE.get(character, character if character.isprintable() else "·") for character in text)
    return (shown[: LONGEST - 1] + "…" if len(shown) > LONGEST else shown) or "(empty)"
