"""Settings: one order, typed values, and messages that name key, value and choice."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapterhub.errors import SettingsError
from adapterhub.settings import load_settings, provenance


def test_the_command_line_beats_the_environment_which_beats_the_file_which_beats_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADAPTERHUB_HOME", str(tmp_path))
    assert provenance()["threads"] == (0, "default")
    (tmp_path / "hub.toml").write_text("threads = 1\n")
    assert provenance()["threads"] == (1, "file")
    monkeypatch.setenv("ADAPTERHUB_THREADS", "2")
    assert provenance()["threads"] == (2, "environment")
    assert provenance(threads=3)["threads"] == (3, "command line")


def test_a_value_that_does_not_parse_stops_with_key_and_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTERHUB_QUANTIZATION", "fp4")
    with pytest.raises(
        SettingsError, match=r"'quantization' has the value 'fp4'.*'nf4', 'int8' or 'none'.*ADAPTERHUB_QUANT"
    ):
        load_settings()


def test_an_unknown_variable_gets_the_near_match(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTERHUB_QUANTISATION", "nf4")
    with pytest.raises(
        SettingsError, match=r"Unknown setting 'quantisation' in the environment. Did you mean 'quantization'\?"
    ):
        load_settings()


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "hub.toml").write_text("threads = \n")
    with pytest.raises(SettingsError, match=r"hub.toml is not valid TOML"):
        load_settings(home=tmp_path)


def test_a_file_cannot_move_the_folder_it_lies_in(tmp_path: Path) -> None:
    (tmp_path / "hub.toml").write_text('home = "/elsewhere"\n')
    with pytest.raises(SettingsError, match="Set ADAPTERHUB_HOME instead"):
        load_settings(home=tmp_path)


def test_settings_cannot_be_edited() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_settings().threads = 3  # pyright: ignore[reportAttributeAccessIssue]
