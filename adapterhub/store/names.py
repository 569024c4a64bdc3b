"""Names and references: `summarize`, `summarize@v2`, `summarize@canary`, `summarize@sha256:...`, `sha256:...`.

Nothing but checked digests ever becomes part of a path, so no name can leave the store.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from adapterhub.base.catalogue import CATALOGUE
from adapterhub.errors import InvalidNameError

__all__ = [
    "DEFAULT_ALIAS",
    "Reference",
    "check_alias",
    "check_digest",
    "check_task",
    "check_text",
    "parse_alias_label",
    "parse_reference",
]

DEFAULT_ALIAS = "stable"

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_VERSION = re.compile(r"v([1-9][0-9]{0,8})")
_VERSION_LIKE = re.compile(r"v[0-9]+")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_DIGEST_PREFIX = re.compile(r"[0-9a-f]{8,64}")
# Requests use these in place of a task, see the fields `adapter` and `model` of the HTTP interface.
_RESERVED_TASKS = ("auto", "base", *sorted(CATALOGUE))
_RULE = "1 to 63 characters of a-z, 0-9, dot, dash and underscore, the first a letter or digit"
_MAX_SHOWN_CHARS = 80
_MAX_TEXT_CHARS = 1000  # Room for a reason with a link; the log is read by people.


@dataclass(frozen=True, slots=True)
class Reference:
    """A parsed reference: one of `number`, `alias` and `digest_prefix` is set; only a digest may lack its task."""

    task: str | None
    number: int | None = None
    alias: str | None = None
    digest_prefix: str | None = None


def _shown(value: str) -> str:
    return repr(value) if len(value) <= _MAX_SHOWN_CHARS else f"{value[:_MAX_SHOWN_CHARS]!r}..."


def check_task(name: str) -> str:
    """Return `name` when it can name a task, else raise InvalidNameError."""
    if not _NAME.fullmatch(name):
        raise InvalidNameError(f"{_shown(name)} cannot name a task.", f"Allowed: {_RULE}.")
    if name in _RESERVED_TASKS:
        raise InvalidNameError(
            f"{name!r} cannot name a task: in requests it means something else.",
            f"Reserved: {', '.join(_RESERVED_TASKS)}; choose another name.",
        )
    return name


def check_alias(name: str) -> str:
    """Return `name` when it can name an alias, else raise InvalidNameError."""
    if not _NAME.fullmatch(name):
        raise InvalidNameError(f"{_shown(name)} cannot name an alias.", f"Allowed: {_RULE}.")
    if _VERSION_LIKE.fullmatch(name):
        raise InvalidNameError(
            f"{name!r} cannot name an alias: it reads as a version.", "Choose a name such as `stable` or `canary`."
        )
    return name


def check_digest(digest: str) -> str:
    """Return `digest` when it is 64 lower-case hex digits, else raise InvalidNameError."""
    if not _DIGEST.fullmatch(digest):
        raise InvalidNameError(f"{_shown(digest)} is not a sha256 digest.", "Allowed: 64 characters of 0-9 and a-f.")
    return digest


def check_text(text: str, *, what: str) -> str:
    """Return `text` when the log can hold it, else raise InvalidNameError. what: `actor` or `reason`."""
    is_encodable = not any("\ud800" <= char <= "\udfff" for char in text)
    if not text.strip() or len(text) > _MAX_TEXT_CHARS or not is_encodable:
        raise InvalidNameError(
            f"The {what} {_shown(text)} cannot be logged.", f"Allowed: 1 to {_MAX_TEXT_CHARS} characters of valid text."
        )
    return text


def parse_reference(text: str) -> Reference:
    """Split a reference. Raises InvalidNameError saying which part does not parse."""
    if text.startswith("sha256:"):
        return Reference(None, digest_prefix=_digest_prefix(text))
    task, separator, rest = text.partition("@")
    check_task(task)
    if not separator:
        return Reference(task, alias=DEFAULT_ALIAS)
    if rest.startswith("sha256:"):
        return Reference(task, digest_prefix=_digest_prefix(rest))
    if version := _VERSION.fullmatch(rest):
        return Reference(task, number=int(version[1]))
    if _VERSION_LIKE.fullmatch(rest):
        raise InvalidNameError(f"{_shown(text)} names no version.", "Versions are `@v1`, `@v2` and so on.")
    return Reference(task, alias=check_alias(rest))


def parse_alias_label(text: str) -> tuple[str, str]:
    """Split `task@alias`. Raises InvalidNameError."""
    task, separator, name = text.partition("@")
    if not separator:
        raise InvalidNameError(f"{_shown(text)} names no alias.", "Write task@alias, such as `summarize@stable`.")
    return check_task(task), check_alias(name)


def _digest_prefix(text: str) -> str:
    prefix = text.removeprefix("sha256:")
    if not _DIGEST_PREFIX.fullmatch(prefix):
        raise InvalidNameError(
            f"{_shown(text)} is not a digest reference.", "Allowed: `sha256:` and 8 to 64 characters of 0-9 and a-f."
        )
    return prefix
