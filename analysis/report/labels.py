"""Labels of tokens: the text of vocabulary ids, if the model's tokenizer is available."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from analysis.counts.survey import Axes, TokenKey
from profiler.errors import SpecmoeError, first_line
from profiler.models.resolve import DEMO_MODEL, demo_model_folder

# Longest label in characters: a token of an untrusted trace may be arbitrarily long.
LONGEST = 24
# The same for a token within its text, where white space may be long.
LONGEST_TEXT = 100
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


def sequence_texts(sequences: Sequence[Sequence[TokenKey | None]], model: str, tokenizer: str | None = None) -> list[list[str]]:
    """The text that each token adds to its sequence: characters of several tokens belong to the last of them.

    sequences: vocabulary ids, texts, or None where a token is unknown (a `?`). model, tokenizer: as for `token_labels`, whose
    errors this raises. Ids whose text is unknown become `#id`.
    """
    has_numbers = any(isinstance(key, int) for keys in sequences for key in keys)
    loaded = _load(model, tokenizer) if has_numbers else None
    return [_sequence_text(keys, loaded) for keys in sequences]


def _sequence_text(keys: Sequence[TokenKey | None], loaded: Any) -> list[str]:
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(skip_special_tokens=False)
    texts = []
    for key in keys:
        if isinstance(key, str):
            text = key
        elif key is None:
            text = "?"
        elif loaded is None or not 0 <= key < loaded.get_vocab_size():
            text = f"#{key}"
        else:
            try:
                text = stream.step(loaded, key) or ""
            # The library raises plain `Exception`, for instance for ids between those that the vocabulary has.
            except Exception:
                text, stream = f"#{key}", DecodeStream(skip_special_tokens=False)
        texts.append(text[:LONGEST_TEXT])
    return texts


def _texts(numbers: list[int], model: str, tokenizer: str | None) -> dict[int, str]:
    loaded = _load(model, tokenizer)
    if loaded is None:
        return {}
    size = loaded.get_vocab_size()
    return {number: loaded.decode([number], skip_special_tokens=False) for number in numbers if 0 <= number < size}


def _load(model: str, tokenizer: str | None) -> Any:
    """The tokenizer; None if there is none on this machine and the user named none."""
    file = _tokenizer_file(model, tokenizer)
    if file is None:
        return None
    from tokenizers import Tokenizer

    try:
        if file.stat().st_size > MAX_TOKENIZER_BYTES:
            raise SpecmoeError(f"{file} is larger than {MAX_TOKENIZER_BYTES >> 20} MiB: not a tokenizer")
        return Tokenizer.from_file(str(file))
    # The library raises plain `Exception`.
    except Exception as error:
        if tokenizer is None:
            return None
        raise SpecmoeError(f"tokenizer {tokenizer} could not be loaded: {first_line(error)}") from error


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
