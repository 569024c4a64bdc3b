"""Aliases move by compare-and-swap; each move is a row of an append-only log whose rows are chained by hash."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, Select, func, insert, select, update

from adapterhub.errors import ConflictError, StoreCorruptError
from adapterhub.store.canonical import digest_of
from adapterhub.store.catalogue import ALIAS_LOG, ALIASES, VERSIONS
from adapterhub.store.entries import Alias, LogEntry, Version
from adapterhub.store.names import check_alias, check_text
from adapterhub.store.versions import now

__all__ = ["list_aliases", "log_head", "move_alias", "read_log", "verify_log"]

_FIRST_HASH = "0" * 64  # What the first row names as the hash before it.


def _aliases() -> Select[Any]:
    same_version = (VERSIONS.c.task == ALIASES.c.task) & (VERSIONS.c.number == ALIASES.c.number)
    return select(ALIASES, VERSIONS.c.serving_digest).join(VERSIONS, same_version)


def _alias(row: Row[Any]) -> Alias:
    return Alias(
        task=row.task,
        name=row.name,
        number=row.number,
        serving_digest=row.serving_digest,
        generation=row.generation,
        updated_at=datetime.fromisoformat(row.updated_at),
        updated_by=row.updated_by,
        reason=row.reason,
    )


def list_aliases(connection: Connection, task: str | None = None) -> list[Alias]:
    """Aliases of one task or of all, by task and name."""
    query = _aliases().order_by(ALIASES.c.task, ALIASES.c.name)
    if task is not None:
        query = query.where(ALIASES.c.task == task)
    return [_alias(row) for row in connection.execute(query)]


def _find_alias(connection: Connection, task: str, name: str) -> Alias | None:
    row = connection.execute(_aliases().where(ALIASES.c.task == task, ALIASES.c.name == name)).first()
    return None if row is None else _alias(row)


def move_alias(
    connection: Connection, version: Version, *, name: str, expected_generation: int | None, actor: str, reason: str
) -> Alias:
    """Point alias `name` of the version's task to it, inside the caller's write transaction.

    expected_generation: the generation last seen; None means that the alias must not exist yet. Raises ConflictError
    with the current state when another writer was first.
    """
    current = _find_alias(connection, version.task, check_alias(name))
    if (None if current is None else current.generation) != expected_generation:
        raise _conflict(f"{version.task}@{name}", current, expected_generation)
    moved = Alias(
        task=version.task,
        name=name,
        number=version.number,
        serving_digest=version.serving_digest,
        generation=(expected_generation or 0) + 1,
        updated_at=now(),
        updated_by=check_text(actor, what="actor"),
        reason=check_text(reason, what="reason"),
    )
    values = {
        "number": moved.number,
        "generation": moved.generation,
        "updated_at": moved.updated_at.isoformat(),
        "updated_by": actor,
        "reason": reason,
    }
    if current is None:
        connection.execute(insert(ALIASES).values(task=moved.task, name=name, **values))
    else:
        is_current = (
            (ALIASES.c.task == moved.task) & (ALIASES.c.name == name) & (ALIASES.c.generation == expected_generation)
        )
        if connection.execute(update(ALIASES).where(is_current).values(**values)).rowcount != 1:
            raise _conflict(moved.label, current, expected_generation)
    _append(connection, moved, version, previous_number=None if current is None else current.number)
    return moved


def _conflict(label: str, current: Alias | None, expected_generation: int | None) -> ConflictError:
    if current is None:
        return ConflictError(
            f"Alias {label!r} does not exist, so it is not at generation {expected_generation}.",
            "Expect no generation to create it.",
        )
    expected = "not to exist yet" if expected_generation is None else f"to be at generation {expected_generation}"
    return ConflictError(
        f"Alias {label!r} was expected {expected}; it is at generation {current.generation} and points to "
        f"v{current.number}, set by {current.updated_by!r} ({current.reason!r}).",
        f"Look again with `hub alias list` and repeat with generation {current.generation} if you still want the move.",
    )


def log_head(connection: Connection) -> int:
    """Row id of the newest log row, 0 for an empty log."""
    return connection.scalar(select(func.max(ALIAS_LOG.c.id))) or 0


def read_log(connection: Connection, task: str | None = None) -> list[LogEntry]:
    """Log rows of one task or of all, oldest first."""
    query = select(ALIAS_LOG).order_by(ALIAS_LOG.c.id)
    if task is not None:
        query = query.where(ALIAS_LOG.c.task == task)
    return [LogEntry(**row) for row in connection.execute(query).mappings()]


def _hash(fields: dict[str, Any]) -> str:
    return digest_of({key: value for key, value in fields.items() if key != "hash"}, what="log row")


def _append(connection: Connection, alias: Alias, version: Version, *, previous_number: int | None) -> None:
    head = log_head(connection)
    last_hash = connection.scalar(select(ALIAS_LOG.c.hash).where(ALIAS_LOG.c.id == head))
    fields: dict[str, Any] = {
        "id": head + 1,
        "task": alias.task,
        "alias": alias.name,
        "generation": alias.generation,
        "previous_number": previous_number,
        "number": alias.number,
        "serving_digest": version.serving_digest,
        "manifest_digest": version.manifest_digest,
        "actor": alias.updated_by,
        "reason": alias.reason,
        "at": alias.updated_at.isoformat(),
        "previous_hash": last_hash or _FIRST_HASH,
    }
    connection.execute(insert(ALIAS_LOG).values(**fields, hash=_hash(fields)))


def verify_log(connection: Connection) -> int:
    """Check every hash, the chain, and that aliases and versions agree with it; return the number of rows.

    Raises StoreCorruptError naming the first row that does not fit. Someone who can rewrite the whole file can also
    recompute every hash; compare the last hash with one written down elsewhere to exclude that.
    """
    previous_hash, position = _FIRST_HASH, 0
    last: dict[tuple[str, str], tuple[int, int]] = {}
    versions = {
        (row.task, row.number): (row.serving_digest, row.manifest_digest)
        for row in connection.execute(select(VERSIONS))
    }
    for row in connection.execute(select(ALIAS_LOG).order_by(ALIAS_LOG.c.id)).mappings():
        position += 1
        key = (row["task"], row["alias"])
        if row["id"] != position:
            raise _tampered(position, "is missing")
        if row["hash"] != _hash(dict(row)):
            raise _tampered(position, "was changed after it was written")
        if row["previous_hash"] != previous_hash:
            raise _tampered(position, "does not follow the row before it")
        if versions.get((row["task"], row["number"])) != (row["serving_digest"], row["manifest_digest"]):
            raise _tampered(position, f"names {row['task']}@v{row['number']}, which has other content now")
        if row["generation"] != last.get(key, (0, 0))[0] + 1:
            raise _tampered(position, f"skips a generation of {row['task']}@{row['alias']}")
        previous_hash = row["hash"]
        last[key] = (row["generation"], row["number"])
    aliases = {(alias.task, alias.name): (alias.generation, alias.number) for alias in list_aliases(connection)}
    for key in sorted(aliases.keys() | last.keys()):
        if aliases.get(key) != last.get(key):
            raise StoreCorruptError(
                f"Alias '{key[0]}@{key[1]}' is not where the log of {position} rows left it.",
                "Rows were cut off or the alias was moved past the log; restore the catalogue from a backup.",
            )
    return position


def _tampered(position: int, fault: str) -> StoreCorruptError:
    return StoreCorruptError(
        f"Row {position} of the alias log {fault}.", "Restore the catalogue from a backup and find out who had access."
    )
