"""The upload of a run to the Hugging Face hub."""

from __future__ import annotations

from profiler.errors import SpecmoeError
from profiler.trace.hub import CARD_FILE, push_folder
from speculation.training.runs import Run

# The files of a run that are uploaded; logs and checkpoints are not.
PUSHED = ["config.json", "*.safetensors", "metrics.json", "provenance.json", "training.csv", CARD_FILE]


def push_run(run: Run, repository: str, *, private: bool = False, with_texts: bool = False) -> str:
    """Upload a run as the model `repository` and return its URL.

    Args:
        run: A finished run.
        repository: `user/name`.
        private: Whether to make the model private.
        with_texts: Whether a run may be uploaded that contains texts of training problems.

    Raises:
        SpecmoeError: The run contains such texts, and they may not be uploaded.
        TraceError: The hub refuses; the message is the hub's.
    """
    if run.predictor.keeps_training_texts() and not with_texts:
        raise SpecmoeError(f"{run.path} contains texts of training problems (token ids and routes): allow them to be uploaded")
    return push_folder(run.path, repository, kind="model", message="Expert predictor", patterns=PUSHED, private=private)
