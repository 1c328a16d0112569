"""Labels of tokens: the text of vocabulary ids, if the model's tokenizer is available."""

from __future__ import annotations

from pathlib import Path

from analysis.counts.survey import Axes
from profiler.errors import SpecmoeError, first_line
from profiler.models.resolve import DEMO_MODEL, demo_model_folder

# Longest label in characters: a token of an untrusted trace may be arbitrarily long.
LONGEST = 24
TOKENIZER_FILE = "tokenizer.json"
MAX_TOKENIZER_BYTES = 256 << 20
VISIBLE = {" ": "␣", "\n": "⏎", "\r": "⏎", "\t": "⇥"}


def token_labels(axes: Axes, model: str, tokenizer: str | None = None) -> list[str]:
    """A label for each token of `axes.vocabulary`: its text with visible white space, or `#id` where the text is unknown.

    model: the trace's model. Its tokenizer is used only if it is already on this machine: a trace cannot trigger a download,
    and no code of the model is run. tokenizer: a folder or hub id to use instead. Raises `SpecmoeError` if that tokenizer
    cannot be loaded.
    """
    numbers = [key for key in axes.vocabulary if isinstance(key, int)]
    texts = _texts(numbers, model, tokenizer) if numbers else {}
    return [_visible(key if isinstance(key, str) else texts.get(key, f"#{key}")) for key in axes.vocabulary]


def _texts(numbers: list[int], model: str, tokenizer: str | None) -> dict[int, str]:
    file = _tokenizer_file(model, tokenizer)
    if file is None:
        return {}
    from tokenizers import Tokenizer

    try:
        if file.stat().st_size > MAX_TOKENIZER_BYTES:
            raise SpecmoeError(f"{file} is larger than {MAX_TOKENIZER_BYTES >> 20} MiB: not a tokenizer")
        loaded = Tokenizer.from_file(str(file))
    # The library raises plain `Exception`.
    except Exception as error:
        if tokenizer is None:
            return {}
        raise SpecmoeError(f"tokenizer {tokenizer} could not be loaded: {first_line(error)}") from error
    size = loaded.get_vocab_size()
    return {number: loaded.decode([number], skip_special_tokens=False) for number in numbers if 0 <= number < size}


def _tokenizer_file(model: str, tokenizer: str | None) -> Path | None:
    """`tokenizer.json` of `tokenizer`, downloaded if needed; without it, the model's if it is already on this machine."""
    if tokenizer is None and model == DEMO_MODEL:
        return demo_model_folder() / TOKENIZER_FILE
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if tokenizer is not None:
        if Path(tokenizer).is_dir():
            return Path(tokenizer) / TOKENIZER_FILE
        try:
            return Path(hf_hub_download(tokenizer, TOKENIZER_FILE))
        except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
            raise SpecmoeError(
                f"tokenizer {tokenizer}: not a folder, and could not be loaded from the hub: {first_line(error)}"
            ) from error
    try:
        # Names that are not valid on the hub, such as paths, are rejected: a trace must not be able to pick a local file.
        found = try_to_load_from_cache(model, TOKENIZER_FILE)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _visible(text: str) -> str:
    shown = "".join(VISIBLE.get(character, character if character.isprintable() else "·") for character in text)
    return (shown[: LONGEST - 1] + "…" if len(shown) > LONGEST else shown) or "(empty)"
