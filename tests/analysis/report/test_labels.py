"""What tokens are called: their text where it is known, and nothing that a trace could choose on this machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.frames import make_axes

from analysis.report.labels import token_labels
from profiler.errors import SpecmoeError


def test_texts_of_a_converted_trace_are_shown_with_their_blanks() -> None:
    axes = make_axes(1, 4, 1, vocabulary=(" the", "\n", "a" * 100, "", "\x1b[31m"))
    assert token_labels(axes, "unknown") == ["␣the", "⏎", "a" * 23 + "…", "(empty)", "·[31m"]


def test_the_demo_s_tokens_have_their_text() -> None:
    labels = token_labels(make_axes(1, 4, 1, vocabulary=(5, 300, 10**9)), "demo")
    assert labels[2] == "#1000000000"
    assert not labels[1].startswith("#")


def test_an_unknown_model_s_tokens_have_numbers() -> None:
    assert token_labels(make_axes(1, 4, 1, vocabulary=(5,)), "some/model") == ["#5"]


def test_a_trace_cannot_choose_a_folder(tmp_path: Path) -> None:
    from profiler.models.resolve import demo_model_folder

    (tmp_path / "tokenizer.json").write_bytes((demo_model_folder() / "tokenizer.json").read_bytes())
    axes = make_axes(1, 4, 1, vocabulary=(300,))
    assert token_labels(axes, str(tmp_path)) == ["#300"]
    assert token_labels(axes, "../.." + str(tmp_path)) == ["#300"]
    # The user can.
    assert token_labels(axes, "unknown", str(tmp_path)) == token_labels(axes, "demo")


@pytest.mark.parametrize("content", [None, json.dumps({"a": 1})])
def test_what_is_not_a_tokenizer_is_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(SpecmoeError, match="could not be loaded"):
        token_labels(make_axes(1, 4, 1, vocabulary=(1,)), "unknown", str(tmp_path))
