"""The kernels are compiled once, by whoever comes first, and a machine that cannot compile is told what it loses."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapterhub.errors import SettingsError
from server.kernels import load_kernel
from server.kernels.native import find_library
from tests.support.native import require_library

# Stands in for Zig: notes that it was called, takes a moment, and hands out what the real compiler made.
FAKE_COMPILER = """
import pathlib, shutil, sys, time
pathlib.Path({log!r}).open("a").write("called\\n")
time.sleep(0.3)
shutil.copy({made!r}, sys.argv[sys.argv.index("-o") + 1])
"""
BROKEN_COMPILER = "import sys; sys.exit('no such processor')"


@pytest.fixture(autouse=True)
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Give the real library; then forget it, and let a new one be built in the home folder only."""
    path = require_library().path
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setenv("ADAPTERHUB_HOME", str(tmp_path / "hub"))
    find_library.cache_clear()
    yield path
    find_library.cache_clear()


def use_compiler(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "compiler" / "ziglang"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("", encoding="utf-8")
    (package / "__main__.py").write_text(code, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(package.parent))


def num_calls(tmp_path: Path) -> int:
    log = tmp_path / "calls"
    return len(log.read_text(encoding="utf-8").splitlines()) if log.exists() else 0


def test_the_library_is_compiled_once_and_found_ever_after(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use_compiler(FAKE_COMPILER.format(log=str(tmp_path / "calls"), made=str(made)), tmp_path, monkeypatch)
    with caplog.at_level(logging.INFO, logger="server.kernels.native.library"):
        first = find_library()
        assert find_library() is first
        find_library.cache_clear()  # As in the next process.
        second = find_library()
    assert first is not None
    assert second is not None
    assert first.path == second.path == tmp_path / "hub" / "kernels" / made.name
    assert [path.name for path in first.path.parent.iterdir()] == [made.name]
    assert num_calls(tmp_path) == 1
    assert caplog.messages == [
        "compiling kernels for this processor; this takes some seconds, once",
        f"compiled kernels: {first.path}",
        f"compiled kernels: {first.path}",
    ]


def test_processes_that_start_together_all_get_the_library(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_compiler(FAKE_COMPILER.format(log=str(tmp_path / "calls"), made=str(made)), tmp_path, monkeypatch)
    code = (
        "import os; os.access = lambda *_: False; from server.kernels.native.library import find_library; "
        "library = find_library(); print(library and library.path)"
    )
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [process.communicate(timeout=120)[0].strip() for process in running]
    target = tmp_path / "hub" / "kernels" / made.name
    assert answers == [str(target)] * 2
    assert [path.name for path in target.parent.iterdir()] == [made.name]
    assert num_calls(tmp_path) >= 1


def test_a_compiler_that_fails_costs_speed_and_is_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use_compiler(BROKEN_COMPILER, tmp_path, monkeypatch)
    assert find_library() is None
    assert caplog.messages == [
        "no compiled kernels, so steps take two to four times as long: the compiler failed with "
        "'no such processor'. They need Linux and ziglang."
    ]
    assert list((tmp_path / "hub" / "kernels").iterdir()) == []


def test_a_machine_without_the_compiler_is_told_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ziglang" else find_spec(name))
    assert find_library() is None
    assert caplog.messages == [
        "no compiled kernels, so steps take two to four times as long: PackageNotFoundError: "
        "No package metadata was found for ziglang. They need Linux and ziglang."
    ]


def test_another_system_is_told_that_it_is_not_supported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "platform", "plan9")
    assert find_library() is None
    assert caplog.messages == [
        "no compiled kernels, so steps take two to four times as long: OSError: plan9 is not supported. "
        "They need Linux and ziglang."
    ]


def test_a_home_that_cannot_be_written_costs_speed_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "hub").write_text("a file where the folder should be", encoding="utf-8")
    assert find_library() is None
    assert caplog.messages == [
        "no compiled kernels, so steps take two to four times as long: "
        f"NotADirectoryError: [Errno 20] Not a directory: {str(tmp_path / 'hub' / 'kernels')!r}. "
        "They need Linux and ziglang."
    ]


def test_the_kernel_cannot_be_asked_for_where_nothing_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.kernels.native.deltas.find_library", lambda: None)
    with pytest.raises(SettingsError) as caught:
        load_kernel("native")
    assert str(caught.value) == (
        "The kernel 'native' is not compiled here. Use 'cpu', or install the package ziglang on Linux."
    )
