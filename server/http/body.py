"""The base of every request body: what is neither a field nor a value that asks for nothing is refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, cast

from pydantic import BaseModel, ConfigDict, JsonValue, model_validator

from adapterhub.errors import UnsupportedFieldError, suggest

__all__ = ["Body", "Neutral"]

Neutral = Mapping[str, Sequence[JsonValue]]


def _is_neutral(value: object, neutral: Sequence[JsonValue]) -> bool:
    return value is None or any(type(value) is type(one) and value == one for one in neutral)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


class Body(BaseModel):
    """Refuses what is neither a field nor neutral, and removes what is neutral.

    neutral: fields known to clients but without support here, and the values besides null that ask for nothing; place:
    of an object inside another, the path that errors begin with.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    neutral: ClassVar[Neutral] = {}
    place: ClassVar[str] = ""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, raw: object) -> object:
        if not isinstance(raw, dict):
            return raw
        known = {field.alias or name for name, field in cls.model_fields.items()}
        kept: dict[str, JsonValue] = {}
        for field, value in cast("dict[str, JsonValue]", raw).items():
            if field in known:
                kept[field] = value
            elif field not in cls.neutral:
                near = suggest(field, known, otherwise=f"Supported: {', '.join(sorted(known))}.")
                path = cls._path(field)
                raise UnsupportedFieldError(f"Unknown field {path!r}.", near).at(path)
            elif not _is_neutral(value, cls.neutral[field]):
                allowed = " or ".join(repr(one) for one in [None, *cls.neutral[field]])
                path = cls._path(field)
                raise UnsupportedFieldError(
                    f"Field {path!r} with the value {_shown(value)} is not supported by this server.",
                    f"Leave it out (or send {allowed}).",
                ).at(path)
        return kept

    @classmethod
    def _path(cls, field: str) -> str:
        return f"{cls.place}.{field}" if cls.place else field
