"""JSON with one spelling per value, to be hashed; and JSON read without tolerance.

Source: RFC 8785 (https://www.rfc-editor.org/rfc/rfc8785), through the package `rfc8785`.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, NoReturn

import rfc8785

from adapterhub.errors import UserInputError

__all__ = ["canonical_json", "digest_of", "strict_json"]


def canonical_json(value: Any, *, what: str) -> bytes:
    """Write `value` as canonical JSON. Raises UserInputError naming `what` for NaN, infinity and integers past 2^53."""
    try:
        return rfc8785.dumps(value)
    except (rfc8785.CanonicalizationError, UnicodeEncodeError) as exc:
        raise UserInputError(
            f"The {what} cannot be written as canonical JSON: {exc}.", "Numbers must be finite and within 2^53."
        ) from exc


def digest_of(value: Any, *, what: str) -> str:
    """sha256 of the canonical JSON of `value`, in hex."""
    return hashlib.sha256(canonical_json(value, what=what)).hexdigest()


def strict_json(data: bytes) -> object:
    """Parse UTF-8 JSON; raises ValueError for duplicate keys, NaN, infinities and what nests too deeply."""
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("it nests too deeply") from None


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result: dict[str, object] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key!r} occurs twice")
        result[key] = value
    return result


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
