"""Command-line options from the fields of a configuration model, checked by it, with errors that name the option."""

from __future__ import annotations

import argparse
import types
from collections.abc import Mapping
from typing import Any, TypeVar, get_origin

from pydantic import BaseModel, ValidationError

from adapterhub.errors import UserInputError

__all__ = ["add_options", "build_config", "check_options"]

_Config = TypeVar("_Config", bound=BaseModel)


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
