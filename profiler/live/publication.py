"""How processes publish metrics: each replaces a small JSON file in one folder, and whoever serves metrics reads all files.

vLLM's server, its engine and the scoring process are processes of their own, so that a registry in memory would not do. Nothing
here needs vLLM or `prometheus_client`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Self

from profiler.live.metrics import BY_NAME, Samples
from profiler.trace.writer import temporary_of

SUFFIX = ".json"


@dataclass(frozen=True)
class Publication:
    """What one process publishes. model, engine: the labels `model_name` and `engine` of all its samples."""

    model: str
    engine: str
    samples: Samples

    def to_json(self) -> str:
        """The file's content."""
        values = {name: [[*labels, value] for labels, value in found.items()] for name, found in self.samples.values.items()}
        return json.dumps({"model": self.model, "engine": self.engine, "samples": values}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Parse a file's content. Metrics that this version does not know are left out."""
        document = json.loads(text)
        samples = Samples()
        for name, found in document["samples"].items():
            if name in BY_NAME:
                for *labels, value in found:
                    samples.add(BY_NAME[name], float(value), *labels)
        return cls(str(document["model"]), str(document["engine"]), samples)


class Publisher:
    """Publishes the samples of one process, until `close` removes them.

    Args:
        path: The file, in the folder that all processes share.
        model, engine: see `Publication`.
    """

    def __init__(self, path: Path, model: str, engine: str) -> None:
        self.path, self.model, self.engine = path, model, engine

    @classmethod
    def of_engine(cls, folder: Path, model: str) -> Self:
        """A publisher for an engine, which gets the smallest number that no other engine of the folder has."""
        folder.mkdir(parents=True, exist_ok=True)
        for number in count():
            path = folder / f"engine-{number}{SUFFIX}"
            try:
                path.touch(exist_ok=False)
            except FileExistsError:
                continue
            return cls(path, model, str(number))
        raise AssertionError

    def publish(self, samples: Samples) -> None:
        """Replace what was published before. Raises `OSError` if the file cannot be written."""
        with temporary_of(self.path) as temporary:
            temporary.write_text(Publication(self.model, self.engine, samples).to_json(), encoding="utf-8")

    def close(self) -> None:
        """Publish nothing any more."""
        self.path.unlink(missing_ok=True)


def read_publications(folder: Path) -> Iterator[Publication]:
    """What the processes of a folder publish now. Files that are empty, or vanish while they are read, are left out."""
    for path in sorted(folder.glob(f"[!.]*{SUFFIX}")):
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            continue
        if text:
            yield Publication.from_json(text)
