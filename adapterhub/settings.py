"""The only place that reads the environment.

Order: default, file (`hub.toml` in the home folder), environment (`ADAPTERHUB_*`), command line. A value that does not
parse stops the start. `provenance` tells where each value came from, for `hub config show`.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adapterhub.errors import SettingsError, suggest

__all__ = ["Quantization", "Settings", "load_settings", "provenance"]

Quantization = Literal["nf4", "int8", "none"]

_PREFIX = "ADAPTERHUB_"
_FILE_NAME = "hub.toml"


class Settings(BaseModel):
    """Where things are kept and what is used when a command names nothing else."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    home: Path = Field(
        default_factory=lambda: Path.home() / ".adapterhub",
        description="Folder of bases, data assets, runs and the store.",
    )
    base: str = Field(
        default="smollm2-135m-instruct", min_length=1, description="Base model: short name, hub id or folder."
    )
    quantization: Quantization = Field(default="nf4", description="How the frozen base is quantized.")
    recipes: Path | None = Field(
        default=None, description="Extra folder of <task>/recipe.yaml, searched before the shipped ones."
    )
    threads: int = Field(
        default=0,
        ge=0,
        le=512,
        description="CPU threads of torch; 0 leaves torch's own choice. The compiled kernels use the same number.",
    )

    @property
    def assets_dir(self) -> Path:
        """Fetched files, one folder per asset."""
        return self.home / "assets"

    @property
    def bases_dir(self) -> Path:
        """Converted base models, one folder each."""
        return self.home / "bases"

    @property
    def runs_dir(self) -> Path:
        """Training runs, one folder each; adapters that missed their gate stay here."""
        return self.home / "runs"

    @property
    def store_dir(self) -> Path:
        """The adapter store."""
        return self.home / "store"


def _environment() -> dict[str, str]:
    return {key.removeprefix(_PREFIX).lower(): value for key, value in os.environ.items() if key.startswith(_PREFIX)}


def _file(home: Path) -> dict[str, Any]:
    path = home / _FILE_NAME
    if not path.is_file():
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise SettingsError(f"{path} is not valid TOML: {exc}.", "Correct it or move it away.") from exc


def _layers(overrides: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    environment = _environment()
    home = Path(overrides.get("home") or environment.get("home") or Settings().home)
    file = _file(home)
    if "home" in file:
        raise SettingsError(f"{home / _FILE_NAME} sets 'home', the folder it lies in.", f"Set {_PREFIX}HOME instead.")
    return [("file", file), ("environment", environment), ("command line", overrides)]


def load_settings(**overrides: Any) -> Settings:
    """Merge defaults, file, environment and command line.

    Raises SettingsError naming the key, the value and the choices.
    """
    merged: dict[str, Any] = {}
    for source, values in _layers({key: value for key, value in overrides.items() if value is not None}):
        for key, value in values.items():
            if key not in Settings.model_fields:
                hint = suggest(key, Settings.model_fields, otherwise=f"Allowed: {', '.join(Settings.model_fields)}.")
                raise SettingsError(f"Unknown setting {key!r} in the {source}.", hint)
            merged[key] = value
    try:
        return Settings(**merged)
    except ValidationError as exc:
        first = exc.errors()[0]
        key = str(first["loc"][0])
        raise SettingsError(
            f"Setting {key!r} has the value {merged.get(key)!r}: {first['msg']}.",
            f"Change it in {_FILE_NAME}, {_PREFIX}{key.upper()} or on the command line.",
        ) from exc


def provenance(**overrides: Any) -> dict[str, tuple[Any, str]]:
    """Return {setting: (value, where it came from)}."""
    settings = load_settings(**overrides)
    origin = dict.fromkeys(Settings.model_fields, "default")
    for source, values in _layers({key: value for key, value in overrides.items() if value is not None}):
        origin.update(dict.fromkeys(values, source))
    return {key: (getattr(settings, key), origin[key]) for key in Settings.model_fields}
