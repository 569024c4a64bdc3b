"""Command-line options from the fields of a configuration model, checked by it, with errors that name the option.

A measurement that needs no other options is a command with `run_command`.
"""

from __future__ import annotations

import argparse
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, get_origin

from pydantic import BaseModel, ValidationError

from adapterhub.errors import AdapterHubError, UserInputError
from adapterhub.settings import Settings, load_settings
from benchmarks.peers.build import DEFAULT_CACHE

__all__ = ["Measure", "add_options", "build_config", "check_options", "run_command"]

_Config = TypeVar("_Config", bound=BaseModel)
_Given = TypeVar("_Given", bound=BaseModel, contravariant=True)


class Measure(Protocol[_Given]):
    """Measures what a configuration asks for and writes the result to `out`; `cache` keeps what is made on the way."""

    def __call__(self, config: _Given, /, *, settings: Settings, cache: Path, out: Path) -> None:
        """Raises AdapterHubError."""
        ...


def run_command(
    measure: Measure[_Config],
    model: type[_Config],
    arguments: Sequence[str] | None,
    *,
    about: str | None,
    cache_help: str,
    result: Path,
) -> None:
    """Measure with options from the command line; exits with 2 for wrong ones.

    arguments: those of the process when None; about: shown by --help; result: written to when --out names nothing else.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help=cache_help)
    parser.add_argument("--out", type=Path, default=result)
    add_options(parser, model)
    parsed = parser.parse_args(arguments)
    try:
        measure(check_options(parsed, model), settings=load_settings(), cache=parsed.cache, out=parsed.out)
    except AdapterHubError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(f"Written: {parsed.out}")


def add_options(parser: argparse.ArgumentParser, model: type[BaseModel]) -> None:
    """Add one option per field; tuples are written with commas between their values."""
    for key, field in model.model_fields.items():
        is_list = get_origin(field.annotation) is tuple
        text = field.description or ("separated by commas" if is_list else None)
        parser.add_argument(_option(key), type=_split if is_list else str, default=None, help=text, metavar="VALUE")


def check_options(parsed: types.SimpleNamespace | argparse.Namespace, model: type[_Config]) -> _Config:
    """Build the configuration from what was given. Raises UserInputError."""
    given = {key: getattr(parsed, key) for key in model.model_fields}
    return build_config({key: value for key, value in given.items() if value is not None}, model)


def build_config(raw: Mapping[str, Any], model: type[_Config]) -> _Config:
    """Check values from the command line. Raises UserInputError naming the option, its value and what is allowed."""
    try:
        return model(**raw)
    except ValidationError as exc:
        first = exc.errors()[0]
        key = str(first["loc"][0])
        message = first["msg"].removeprefix("Value error, ").rstrip(".")
        raise UserInputError(f"{_option(key)} is {raw.get(key)!r}: {message}.", "Correct it and start again.") from exc


def _option(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))
