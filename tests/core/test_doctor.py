from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from adapterhub.cli import doctor
from tests.support.tiny_models import build_base


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ADAPTERHUB_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "400")  # One line per finding.
    return tmp_path / "home"


@pytest.fixture
def _pulled(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    monkeypatch.setenv("ADAPTERHUB_BASE", str(build_base(tmp_path / "base").folder))


def hub_doctor() -> Result:
    app = typer.Typer()
    app.command()(lambda: None)  # A second command keeps `doctor` a command of its own.
    doctor.register(app)
    return CliRunner().invoke(app, ["doctor"])


def lines_of(result: Result) -> dict[str, str]:
    rows = (line.split("│") for line in result.stdout.splitlines() if line.count("│") > 3)
    return {cells[1].strip(): " ".join(" ".join(cells[2:]).split()) for cells in rows}


@pytest.mark.usefixtures("_pulled")
def test_a_machine_with_everything_passes_and_nothing_is_created(home: Path) -> None:
    result = hub_doctor()
    assert result.exit_code == 0, result.output
    lines = lines_of(result)
    assert list(lines) == ["python", "torch", "packages", "memory", "disk", "home", "base", "store"]
    assert lines["home"] == f"ok {home}, made by the first command that writes"
    assert lines["base"].startswith("ok ")
    assert not home.exists()


def test_a_base_that_is_not_pulled_is_missing_and_the_remedy_names_it(home: Path) -> None:  # noqa: ARG001
    result = hub_doctor()
    assert result.exit_code == 1
    base = lines_of(result)["base"]
    assert base.startswith("missing Base 'smollm2-135m-instruct' is not on this machine")
    assert base.endswith("Run `hub base pull smollm2-135m-instruct`.")


@pytest.mark.usefixtures("_pulled")
def test_another_base_than_the_configured_one_does_not_count(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_base(home / "bases" / "other")
    monkeypatch.setenv("ADAPTERHUB_BASE", "org/name")
    assert lines_of(hub_doctor())["base"].startswith("missing Base 'org/name' is not on this machine")


@pytest.mark.usefixtures("_pulled")
def test_a_home_that_is_a_file_is_named_without_a_traceback(home: Path) -> None:
    home.touch()
    result = hub_doctor()
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert lines_of(result)["home"] == (
        f"missing {home} is not a writable folder Set ADAPTERHUB_HOME to a writable folder."
    )


@pytest.mark.usefixtures("_pulled")
def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version

    def without(name: str) -> str:
        if name in ("scipy", "rouge-score", "ruff"):
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr("importlib.metadata.version", without)
    result = hub_doctor()
    assert result.exit_code == 1
    assert lines_of(result)["packages"] == (
        "missing rouge-score, scipy pip install -c constraints.txt -e ."  # ruff is for development only.
    )


@pytest.mark.usefixtures("_pulled")
def test_a_check_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> None:
        raise PermissionError(13, "Permission denied", "/home/x")

    monkeypatch.setattr("shutil.disk_usage", broken)
    result = hub_doctor()
    assert result.exit_code == 1
    assert lines_of(result)["disk"].startswith("missing PermissionError: [Errno 13] Permission denied: '/home/x'")
