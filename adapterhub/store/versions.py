"""Versions in the catalogue: insert, look up, list."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, Row, func, insert, select

from adapterhub.errors import AdapterNotFoundError, AliasNotFoundError, InvalidNameError, UserInputError
from adapterhub.records import Manifest, Method
from adapterhub.store.catalogue import ALIASES, VERSIONS
from adapterhub.store.entries import Version
from adapterhub.store.names import Reference, parse_reference

__all__ = [
    "find_by_manifest",
    "insert_version",
    "list_tasks",
    "list_versions",
    "now",
    "resolve",
    "resolve_in_task",
    "version_numbered",
]

_SHOWN_DIGEST_CHARS = 12


def now() -> datetime:
    """The current time, UTC."""
    return datetime.now(UTC)


def _version(row: Row[Any]) -> Version:
    return Version(
        task=row.task,
        number=row.number,
        serving_digest=row.serving_digest,
        manifest_digest=row.manifest_digest,
        base_digest=row.base_digest,
        method=Method(row.method),
        created_at=datetime.fromisoformat(row.created_at),
    )


def list_versions(connection: Connection, task: str | None = None) -> list[Version]:
    """Versions of one task or of all, by task and number."""
    query = select(VERSIONS).order_by(VERSIONS.c.task, VERSIONS.c.number)
    if task is not None:
        query = query.where(VERSIONS.c.task == task)
    return [_version(row) for row in connection.execute(query)]


def list_tasks(connection: Connection) -> list[str]:
    """Tasks with at least one version, sorted."""
    return list(connection.scalars(select(VERSIONS.c.task).distinct().order_by(VERSIONS.c.task)))


def find_by_manifest(connection: Connection, task: str, manifest_digest: str) -> Version | None:
    """The version of `task` with exactly that content, or None."""
    query = select(VERSIONS).where(VERSIONS.c.task == task, VERSIONS.c.manifest_digest == manifest_digest)
    row = connection.execute(query).first()
    return None if row is None else _version(row)


def insert_version(connection: Connection, manifest: Manifest, manifest_digest: str) -> Version:
    """Give the manifest the next number of its task. The unique constraints decide between writers."""
    highest = connection.scalar(select(func.max(VERSIONS.c.number)).where(VERSIONS.c.task == manifest.task))
    version = Version(
        task=manifest.task,
        number=(highest or 0) + 1,
        serving_digest=manifest.serving_digest,
        manifest_digest=manifest_digest,
        base_digest=manifest.base.digest,
        method=manifest.method,
        created_at=now(),
    )
    connection.execute(
        insert(VERSIONS).values(
            task=version.task,
            number=version.number,
            serving_digest=version.serving_digest,
            manifest_digest=version.manifest_digest,
            base_digest=version.base_digest,
            method=str(version.method),
            created_at=version.created_at.isoformat(),
        )
    )
    return version


def version_numbered(connection: Connection, task: str, number: int) -> Version:
    """Return `task@v<number>`. Raises AdapterNotFoundError."""
    query = select(VERSIONS).where(VERSIONS.c.task == task, VERSIONS.c.number == number)
    row = connection.execute(query).first()
    if row is None:
        raise _unknown(connection, Reference(task, number=number), f"{task}@v{number}")
    return _version(row)


def resolve(connection: Connection, text: str) -> Version:
    """Return the version a reference names.

    Raises InvalidNameError, AdapterNotFoundError or AliasNotFoundError, each with what exists. Versions with the same
    serving digest answer alike; a digest names the first of them.
    """
    reference = parse_reference(text)
    if reference.digest_prefix is not None:
        return _by_digest(connection, reference, text)
    task = str(reference.task)
    if reference.number is not None:
        return version_numbered(connection, task, reference.number)
    number = connection.scalar(
        select(ALIASES.c.number).where(ALIASES.c.task == task, ALIASES.c.name == reference.alias)
    )
    if number is None:
        raise _unknown(connection, reference, text)
    return version_numbered(connection, task, number)


def resolve_in_task(connection: Connection, text: str, *, task: str) -> Version:
    """Return the version of `task` named by a full reference or by its part after the `@`; raises as `resolve`."""
    is_full = "@" in text or text == task
    version = resolve(connection, text if is_full else f"{task}@{text}")
    if version.task != task:
        raise UserInputError(
            f"An alias of {task!r} cannot point to {version.label}: that belongs to another task.",
            f"Name a version of {task!r}; see `hub adapters list`.",
        )
    return version


def _by_digest(connection: Connection, reference: Reference, text: str) -> Version:
    prefix = VERSIONS.c.serving_digest.startswith(reference.digest_prefix, autoescape=True)
    query = select(VERSIONS).where(prefix).order_by(VERSIONS.c.id)
    if reference.task is not None:
        query = query.where(VERSIONS.c.task == reference.task)
    found = [_version(row) for row in connection.execute(query)]
    if not found:
        raise _unknown(connection, reference, text)
    digests = sorted({version.serving_digest for version in found})
    if len(digests) > 1:
        shown = ", ".join(digest[: _SHOWN_DIGEST_CHARS + len(reference.digest_prefix or "")] for digest in digests)
        raise InvalidNameError(f"{text!r} matches {len(digests)} digests: {shown}.", "Give more digits.")
    return found[0]


def _unknown(connection: Connection, reference: Reference, text: str) -> AdapterNotFoundError | AliasNotFoundError:
    """Build the error for a reference that names nothing, with what there is instead."""
    tasks = list_tasks(connection)
    if reference.task is None:
        return AdapterNotFoundError.named(text, [f"sha256:{v.serving_digest}" for v in list_versions(connection)])
    if reference.task not in tasks:
        return AdapterNotFoundError.named(reference.task if reference.alias == "stable" else text, tasks)
    if reference.alias is None:
        return AdapterNotFoundError.named(text, [v.label for v in list_versions(connection, reference.task)])
    aliases = connection.scalars(
        select(ALIASES.c.name).where(ALIASES.c.task == reference.task).order_by(ALIASES.c.name)
    )
    return AliasNotFoundError(
        f"Task {reference.task!r} has no alias {reference.alias!r}; it has: {', '.join(aliases) or 'none'}.",
        f"Set it with `hub alias set {reference.task}@{reference.alias} {reference.task}@v1`.",
    )
