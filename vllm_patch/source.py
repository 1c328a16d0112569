"""Insert the hook into the source of a local vLLM, for people who maintain a fork or cannot use plugins.

Two files get a few marked lines. The function that selects experts calls the recorder's copy function if its router has one,
and the worker's module loads the recorder when SPECMOE_CAPTURE=1. Everything else is the plugin's code: if the plugin is
active too, it detects the lines and wraps nothing. CPU builds up to 0.29 select experts inside their kernels: there, the second
file alone does the work, when the model is loaded.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from profiler.errors import SpecmoeError
from vllm_patch.releases import HOOKS, NEWEST, OLDEST, SOURCE_ATTRIBUTE, Hook

BEGIN = "# speculative-moe begin: 'python -m vllm_patch revert' removes these lines"
END = "# speculative-moe end"

WORKER_FILE = "v1/worker/worker_base.py"
WORKER_LINES = (
    "import os as _specmoe_os",
    "",
    'if _specmoe_os.environ.get("SPECMOE_CAPTURE") == "1":',
    "    from vllm_patch.plugin import register as _specmoe_register",
    "",
    "    _specmoe_register()",
)
HOOK_LINES = (
    f'{SOURCE_ATTRIBUTE} = getattr(self, "{SOURCE_ATTRIBUTE}", None)',
    f"if {SOURCE_ATTRIBUTE} is not None:",
    f"    {SOURCE_ATTRIBUTE}(hidden_states, router_logits, topk_weights, topk_ids)",
)


class PatchError(SpecmoeError):
    """This vLLM cannot be patched or reverted. Nothing was changed."""


@dataclass(frozen=True)
class Edit:
    """One file of a vLLM package: its current text, and its text without and with our lines."""

    path: Path
    current: str
    plain: str
    patched: str

    @property
    def applied(self) -> bool:
        """Whether the file contains our lines."""
        return self.current == self.patched


@dataclass(frozen=True)
class LocalVllm:
    """A vLLM package on disk. version: from its version file or installation record; None for a checkout that has neither."""

    package: Path
    version: str | None
    hook: Hook
    edits: list[Edit]

    @property
    def state(self) -> str:
        """`applied`, `not applied` or `partly applied`."""
        applied = [edit.applied for edit in self.edits]
        return "applied" if all(applied) else "partly applied" if any(applied) else "not applied"


def open_vllm(path: Path | None = None) -> LocalVllm:
    """Read the vLLM at `path` (the package folder, or a checkout that contains it). Default: the installed vLLM.

    Raises `PatchError` if vLLM is not found, if its source has no known form of expert selection, or if a file differs from
    what is expected.
    """
    package = _package_folder(path)
    hook = _find_hook(package)
    return LocalVllm(package, _version(package), hook, [_hook_edit(package, hook), _worker_edit(package)])


def apply(vllm: LocalVllm) -> list[Path]:
    """Insert the lines that are missing. Returns the changed files, if any. Either all files change or none."""
    return _replace({edit.path: edit.patched for edit in vllm.edits if not edit.applied})


def revert(vllm: LocalVllm) -> list[Path]:
    """Remove our lines and nothing else. Returns the changed files."""
    return _replace({edit.path: edit.plain for edit in vllm.edits if edit.applied})


def diff(vllm: LocalVllm) -> str:
    """The lines that `apply` inserts (or has inserted), as a patch for `git apply` at the root of a checkout."""
    text = ""
    for edit in vllm.edits:
        name = f"vllm/{edit.path.relative_to(vllm.package).as_posix()}"
        lines = (edit.plain.splitlines(keepends=True), edit.patched.splitlines(keepends=True))
        text += "".join(difflib.unified_diff(*lines, f"a/{name}", f"b/{name}"))
    return text


def _package_folder(path: Path | None) -> Path:
    if path is None:
        spec = importlib.util.find_spec("vllm")
        if spec is None or not spec.submodule_search_locations:
            raise PatchError("vLLM is not installed here: give the path of a vLLM package folder or checkout")
        return Path(spec.submodule_search_locations[0])
    for folder in (path, path / "vllm"):
        if (folder / "model_executor").is_dir() and (folder / WORKER_FILE).is_file():
            return folder.resolve()
    raise PatchError(f"{path} is not a vLLM: expected a package folder or checkout with model_executor/ and {WORKER_FILE}")


def _version(package: Path) -> str | None:
    own = package / "_version.py"
    if own.is_file():
        found = re.search(r"^__version__ = .*?'([^']+)'", own.read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return found.group(1)
    records = sorted(package.parent.glob("vllm*.dist-info"))
    return records[0].name.removesuffix(".dist-info").rpartition("-")[2] if records else None


def _find_hook(package: Path) -> Hook:
    """Identify the hook by the source, newest form first: the version number of a fork can be anything."""
    for hook in reversed(HOOKS):
        path = package / hook.source
        if path.is_file() and _find_function(_parse(path, _read(path)), hook.function) is not None:
            return hook
    known = f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"
    raise PatchError(f"{package}: no function that selects experts as in vLLM {known}; looked for {_places()}")


def _places() -> str:
    return ", ".join(f"{hook.function} in {hook.source}" for hook in reversed(HOOKS))


def _hook_edit(package: Path, hook: Hook) -> Edit:
    path = package / hook.source
    current = _read(path)
    plain = _without_block(path, current)
    function = _find_function(_parse(path, plain), hook.function)
    if function is None:
        raise PatchError(f"{path}: no function {hook.function}")
    names = [argument.arg for argument in function.args.args]
    places = [place for statement in function.body if (place := _place(statement)) is not None]
    if names[:3] != ["self", "hidden_states", "router_logits"] or len(places) != 1:
        raise PatchError(
            f"{path}, line {function.lineno}: {hook.function} does not have the expected form: arguments (self, hidden_states, "
            "router_logits, ...), and one statement that sets topk_weights and topk_ids from _compute_routing or one "
            "'if self.enable_eplb' that remaps topk_ids"
        )
    return _edit(path, current, plain, HOOK_LINES, places[0], " " * function.body[0].col_offset)


def _place(statement: ast.stmt) -> int | None:
    """Number of lines before the insertion point: after experts are selected, before ids are remapped to replicas."""
    if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Call):
        called = statement.value.func
        if isinstance(called, ast.Attribute) and called.attr == "_compute_routing":
            return statement.end_lineno
    if isinstance(statement, ast.If) and ast.unparse(statement.test) == "self.enable_eplb":
        first = statement.body[0]
        if isinstance(first, ast.Assign) and ast.unparse(first.targets[0]) == "topk_ids":
            return statement.lineno - 1
    return None


def _worker_edit(package: Path) -> Edit:
    path = package / WORKER_FILE
    current = _read(path)
    plain = _without_block(path, current)
    tree = _parse(path, plain)
    if not any(isinstance(node, ast.ClassDef) and node.name == "WorkerWrapperBase" for node in tree.body):
        raise PatchError(f"{path}: no class WorkerWrapperBase")
    return _edit(path, current, plain, WORKER_LINES, len(plain.splitlines()), "")


def _edit(path: Path, current: str, plain: str, inserted: tuple[str, ...], after: int, indent: str) -> Edit:
    lines = plain.splitlines(keepends=True)
    end = "\r\n" if lines[0].endswith("\r\n") else "\n"
    if not lines[-1].endswith(end):
        raise PatchError(f"{path}: the last line has no line ending; expected the file as vLLM ships it")
    block = [f"{indent}{line}".rstrip() + end for line in (BEGIN, *inserted, END)]
    patched = "".join([*lines[:after], *block, *lines[after:]])
    if current not in (plain, patched):
        number = 1 + next(i for i, line in enumerate(current.splitlines()) if BEGIN in line)
        raise PatchError(f"{path}, line {number}: the marked lines were changed after they were inserted: remove them by hand")
    return Edit(path, current, plain, patched)


def _without_block(path: Path, text: str) -> str:
    lines = text.splitlines(keepends=True)
    begins = [i for i, line in enumerate(lines) if line.strip() == BEGIN]
    ends = [i for i, line in enumerate(lines) if line.strip() == END]
    if not begins and not ends:
        return text
    if len(begins) != 1 or len(ends) != 1 or ends[0] < begins[0]:
        raise PatchError(f"{path}: {len(begins)} begin and {len(ends)} end marks of speculative-moe: remove them by hand")
    return "".join(lines[: begins[0]] + lines[ends[0] + 1 :])


def _find_function(tree: ast.Module, qualified: str) -> ast.FunctionDef | None:
    owner, _, name = qualified.rpartition(".")
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == owner:
            return next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == name), None)
    return None


def _parse(path: Path, text: str) -> ast.Module:
    try:
        return ast.parse(text)
    except SyntaxError as error:
        raise PatchError(f"{path}, line {error.lineno}: not valid Python: {error.msg}") from error


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise PatchError(f"{path}: not UTF-8 at byte {error.start}") from error


def _replace(texts: dict[Path, str]) -> list[Path]:
    """Write every file next to its target first. Then swap the files in, and swap all back if one swap fails."""
    before = {path: path.read_bytes() for path in texts}
    temporary = {path: path.with_name(path.name + ".specmoe-tmp") for path in texts}
    done: list[Path] = []
    try:
        for path, text in texts.items():
            temporary[path].write_bytes(text.encode("utf-8"))
            temporary[path].chmod(path.stat().st_mode)
        for path in texts:
            temporary[path].replace(path)
            done.append(path)
    except OSError as error:
        for path in done:
            path.write_bytes(before[path])
        raise PatchError(f"cannot write {error.filename}: {error.strerror}; nothing was changed") from error
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
    return done
