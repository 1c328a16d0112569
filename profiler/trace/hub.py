"""Export a trace as a Hugging Face dataset: a folder with a dataset card, and its upload."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from profiler.errors import TraceError, counted
from profiler.trace.reader import Trace
from profiler.trace.schema import (
    GATES_FILE,
    HIDDEN_FOLDER,
    JSONL_FILE,
    LOGITS_FOLDER,
    MANIFEST_FILE,
    METADATA_FILE,
    PROBLEMS_FILE,
    ROUTING_FOLDER,
    TOKENS_FILE,
)
from profiler.trace.writer import write_text

CARD_FILE = "README.md"
_CONFIGS = {
    "routing": (f"{ROUTING_FOLDER}/", "one row per (problem, token, MoE layer): expert_ids and weights"),
    "problems": (PROBLEMS_FILE, "prompts, outputs and token counts"),
    "tokens": (TOKENS_FILE, "vocabulary ids and phases of all tokens"),
    "logits": (f"{LOGITS_FOLDER}/", "router logits"),
    "hidden": (f"{HIDDEN_FOLDER}/", "router inputs of some layers"),
}


def write_hub_folder(trace: Trace, folder: Path) -> None:
    """Copy a complete trace to `folder`, with a dataset card that declares each table as a configuration.

    The folder is itself a trace. Raises `TraceError`, before copying anything, if a file does not match the manifest.
    """
    assert trace.manifest is not None
    names = [*_own_files(trace), MANIFEST_FILE]
    linked = next((name for name in names if (trace.path / name).is_symlink()), None)
    if linked is not None:
        raise TraceError(f"{trace.path / linked} is a link, which may point anywhere: copy the trace first")
    faults = trace.faults(verify=True)
    if faults:
        raise TraceError(f"{trace.path}: {faults[0]}")
    if GATES_FILE in names:
        _check_gates(trace.path / GATES_FILE)
    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(trace.path / name, folder / name)
        write_text(folder / CARD_FILE, _card(trace))
    except BaseException:
        shutil.rmtree(folder)
        if not created:
            folder.mkdir()
        raise


def is_folder_of(trace: Trace, folder: Path) -> bool:
    """Whether `folder` is a complete export of this trace."""
    manifest = folder / MANIFEST_FILE
    if not (folder / CARD_FILE).is_file() or not manifest.is_file():
        return False
    return manifest.read_bytes() == (trace.path / MANIFEST_FILE).read_bytes() and not Trace.open(folder).faults(verify=True)


def push_folder(
    folder: Path,
    repository: str,
    *,
    kind: str = "dataset",
    message: str = "Routing trace",
    patterns: list[str] | None = None,
    private: bool = False,
) -> str:
    """Upload a folder to the hub as `repository` and return its address.

    kind: "dataset" or "model". patterns: glob patterns of the files to upload; None for all.
    Needs a token (`hf auth login`, or HF_TOKEN). If the hub refuses, raises `TraceError` with the hub's own message.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = api.create_repo(repository, repo_type=kind, private=private, exist_ok=True)
        if private and not api.repo_info(repository, repo_type=kind).private:
            raise TraceError(f"{repository} exists and is public: make it private on the hub first, or upload it as public")
        # Files left by an earlier push would be loaded together with the new ones: delete them.
        api.upload_folder(
            repo_id=repository,
            repo_type=kind,
            folder_path=folder,
            commit_message=message,
            allow_patterns=patterns,
            delete_patterns=["*.parquet", "*.safetensors", "*.jsonl"],
        )
    except TraceError:
        raise
    except Exception as error:
        # This includes errors of the HTTP library that the client uses, which changes every few releases.
        reason = " ".join(str(error).split())
        raise TraceError(f"the hub did not accept {repository}: {reason}; {folder} is kept") from error
    return str(address)


def _check_gates(path: Path) -> None:
    """Raise `TraceError` unless the file is a safetensors file, which holds tensors and nothing else."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            file.keys()
    except (SafetensorError, OSError) as error:
        raise TraceError(f"{path} is not a safetensors file: {error}") from error


def _own_files(trace: Trace) -> list[str]:
    """The files of the trace that belong to the format: an untrusted manifest may list others."""
    assert trace.manifest is not None
    folders = (f"{ROUTING_FOLDER}/", f"{LOGITS_FOLDER}/", f"{HIDDEN_FOLDER}/")
    single = {METADATA_FILE, PROBLEMS_FILE, TOKENS_FILE, GATES_FILE, JSONL_FILE}
    return [name for name in trace.manifest.files if name in single or (name.startswith(folders) and name.endswith(".parquet"))]


def _card(trace: Trace) -> str:
    """The dataset card: configurations for `load_dataset`, and what a reader must know before using a number from it."""
    model, metadata = trace.metadata.model, trace.metadata
    names = _own_files(trace)
    configs = {name: path for name, (path, _) in _CONFIGS.items() if any(file.startswith(path) for file in names)}
    front: list[str] = ["---", "tags:", "- mixture-of-experts", "- expert-routing", "configs:"]
    for name, path in configs.items():
        pattern = f"{path}*.parquet" if path.endswith("/") else path
        front += [f"- config_name: {name}", f"  data_files: {json.dumps(pattern)}"]
        front += ["  default: true"] if name == "routing" else []
    weights = "weights as the model applies them" if metadata.record.weights else "no weights"
    facts: list[tuple[str, Any]] = [
        ("model", f"{model.id}{f' at {model.revision}' if model.revision else ''}"),
        (
            "routing",
            f"{counted(len(model.moe_layers), 'MoE layer')}, {model.num_experts} experts, top-{model.top_k}, {weights}",
        ),
        ("precision", ", ".join(filter(None, [model.dtype, model.quantization])) or "unknown"),
        ("rows", f"{trace.num_rows:,}, one per (problem, token, MoE layer)"),
        ("data", ", ".join(f"{counted(d.problems, 'problem')} of {d.name}" for d in metadata.datasets) or "unknown"),
        ("recorded with", " ".join(filter(None, [metadata.engine, metadata.versions.get(metadata.engine)]))),
        ("hook", metadata.hook),
        ("created", metadata.created),
    ]
    lines = [
        *front,
        "---",
        "",
        f"# Expert routing of {escaped_line(model.id)}",
        "",
        "Which experts every token of a mixture-of-experts model was routed to.",
        "",
        *(f"- **{name}**: {escaped_line(str(value))}" for name, value in facts),
        *(f"- **gap**: {escaped_line(gap)}" for gap in metadata.gaps),
        *(f"- **note**: {caveat}" for caveat in trace.caveats()),
        "",
        "| configuration | rows |",
        "|---|---|",
        *(f"| {name} | {_CONFIGS[name][1]} |" for name in configs),
        "",
        "```python",
        "from datasets import load_dataset",
        "",
        'routing = load_dataset("THIS/DATASET", "routing", split="train")',
        "```",
        "",
        "`token_id` is the position in prompt + output, from 0; `layer` is the decoder layer's own index; pairs are sorted by",
        "weight. Rows are sorted by (problem_id, token_id, layer). Split by problem, never by token. `metadata.json` has all",
        "settings, `manifest.json` the size and SHA-256 of every file; the folder is a trace that `specmoe` reads.",
        "",
        "The license of the prompts and of the model's outputs is that of their sources.",
        "",
    ]
    return "\n".join(lines)


def escaped_line(text: str) -> str:
    """The text on one line with Markdown and HTML escaped: names come from whoever wrote the metadata."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in " ".join(text.split()))
