"""What the installer says about machines that it cannot serve; without installing anything."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest


@pytest.fixture
def install() -> ModuleType:
    spec = importlib.util.spec_from_file_location("install", Path(__file__).parents[1] / "install.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    return text


def test_an_old_python(
    install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    with pytest.raises(SystemExit, match="1"):
        install.check_machine(tmp_path / ".venv")
    assert "is too old: 3.11 or newer is needed" in one_line(capsys)


def test_a_full_disk(
    install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**30))
    with pytest.raises(SystemExit, match="1"):
        install.check_machine(tmp_path / "deep" / ".venv")
    assert "1.0 GiB free on the disk" in one_line(capsys)


def test_an_environment_without_pip(install: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import venv

    venv.create(tmp_path / ".venv", with_pip=False)
    with pytest.raises(SystemExit, match="1"):
        install.make_environment(tmp_path / ".venv")
    assert "no pip in" in one_line(capsys)


@pytest.mark.parametrize(
    ("system", "machine", "reason"),
    [("darwin", "arm64", "no build for"), ("win32", "AMD64", "no build for"), ("linux", "ppc64le", "no build for ppc64le")],
)
def test_platforms_without_vllm(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch, system: str, machine: str, reason: str
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(install.platform, "machine", lambda: machine)
    assert reason in install.why_no_vllm()


def test_a_processor_without_avx2(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(install.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(Path, "read_text", lambda *_args, **_kwargs: "flags : fpu sse avx\n")
    assert install.why_no_vllm() == "this processor has no AVX2"


@pytest.mark.parametrize(
    ("installed", "asked", "begins"),
    [("--use", "", False), ("--tests", "", False), ("--tests", "--tests", False), ("--use", "--tests", True)],
)
def test_what_is_installed_is_not_installed_again(
    installed: str, asked: str, begins: bool, install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class BeganError(Exception):
        pass

    def begin(_: Path) -> None:
        raise BeganError

    (tmp_path / "installed-from").write_text(f"{install.fingerprint()} {installed}")
    monkeypatch.setattr(sys, "argv", ["install.py", str(tmp_path), *asked.split()])
    monkeypatch.setattr(install, "check_machine", begin)
    if begins:
        with pytest.raises(BeganError):
            install.main()
    else:
        install.main()
