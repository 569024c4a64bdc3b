"""The SQL catalogue: tables, connections and transactions.

Knows rows. Does not know files. SQLite in WAL mode, on a local disk; every writer begins with BEGIN IMMEDIATE, because
a reader that turns writer can fail with SQLITE_BUSY whatever the timeout (https://www.sqlite.org/isolation.html).
"""

from __future__ import annotations

import fcntl
import sqlite3
from collections.abc import Generator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NoReturn

from sqlalchemy import (
    DDL,
    Column,
    Connection,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    UniqueConstraint,
    create_engine,
    event,
)
from sqlalchemy.exc import DatabaseError, SQLAlchemyError

from adapterhub.errors import AdapterHubError, JobFailedError, OverloadedError, StoreCorruptError, UserInputError

__all__ = ["ALIASES", "ALIAS_LOG", "VERSIONS", "Catalogue"]

_SCHEMA_VERSION = 1
_BUSY_TIMEOUT_MS = 30_000  # A write takes milliseconds, so this is a long queue of writers.
_metadata = MetaData()

VERSIONS = Table(
    "versions",
    _metadata,
    Column("id", Integer, primary_key=True),
    Column("task", String(63), nullable=False),
    Column("number", Integer, nullable=False),
    Column("serving_digest", String(64), nullable=False),
    Column("manifest_digest", String(64), nullable=False),
    Column("base_digest", String(64), nullable=False),
    Column("method", String(16), nullable=False),
    Column("created_at", String(40), nullable=False),
    UniqueConstraint("task", "number"),
    UniqueConstraint("task", "manifest_digest"),
    Index("versions_by_serving_digest", "serving_digest"),
)
ALIASES = Table(
    "aliases",
    _metadata,
    Column("task", String(63), nullable=False),
    Column("name", String(63), nullable=False),
    Column("number", Integer, nullable=False),
    Column("generation", Integer, nullable=False),
    Column("updated_at", String(40), nullable=False),
    Column("updated_by", String(1000), nullable=False),
    Column("reason", String(1000), nullable=False),
    PrimaryKeyConstraint("task", "name"),
    ForeignKeyConstraint(["task", "number"], ["versions.task", "versions.number"]),
)
ALIAS_LOG = Table(
    "alias_log",
    _metadata,
    Column("id", Integer, primary_key=True),
    Column("task", String(63), nullable=False),
    Column("alias", String(63), nullable=False),
    Column("generation", Integer, nullable=False),
    Column("previous_number", Integer),
    Column("number", Integer, nullable=False),
    Column("serving_digest", String(64), nullable=False),
    Column("manifest_digest", String(64), nullable=False),
    Column("actor", String(1000), nullable=False),
    Column("reason", String(1000), nullable=False),
    Column("at", String(40), nullable=False),
    Column("previous_hash", String(64), nullable=False, unique=True),
    Column("hash", String(64), nullable=False, unique=True),
)
for _table in (VERSIONS, ALIAS_LOG):
    for _verb in ("UPDATE", "DELETE"):
        _trigger = DDL(
            f"CREATE TRIGGER IF NOT EXISTS {_table.name}_no_{_verb.lower()} BEFORE {_verb} ON {_table.name} "
            f"BEGIN SELECT RAISE(ABORT, '{_table.name} is append-only'); END"
        )
        event.listen(_metadata, "after_create", _trigger.execute_if(dialect="sqlite"))


class Catalogue:
    """Connections to one catalogue. Safe for several threads; a forked process opens its own."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._engine = create_engine(f"sqlite:///{path}")
        event.listen(self._engine, "connect", _configure)
        event.listen(self._engine, "begin", _begin)

    def create(self) -> None:
        """Make the tables where they are missing. Raises UserInputError for a catalogue of a newer AdapterHub."""
        # Only one connection at a time may switch to WAL or create tables; SQLite would fail the others at once.
        with self._path.with_suffix(".lock").open("w") as lock, self._translated():
            fcntl.flock(lock, fcntl.LOCK_EX)
            with closing(sqlite3.connect(self._path, isolation_level=None)) as connection:
                found = connection.execute("PRAGMA user_version").fetchone()[0]
                connection.execute("PRAGMA journal_mode = WAL")
            if found > _SCHEMA_VERSION:
                raise UserInputError(
                    f"The store {str(self._path.parent)!r} has schema {found}; allowed: {_SCHEMA_VERSION}.",
                    "Upgrade AdapterHub, or set ADAPTERHUB_HOME to another folder.",
                )
            if found < _SCHEMA_VERSION:
                with self.write() as writer:
                    _metadata.create_all(writer)
                    writer.exec_driver_sql(f"PRAGMA user_version = {_SCHEMA_VERSION}")

    @contextmanager
    def read(self) -> Generator[Connection]:
        """A connection whose statements all see one state."""
        with self._translated(), self._engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def write(self) -> Generator[Connection]:
        """A write transaction that excludes other writers from its first statement; commits unless the block raises."""
        with self._translated(), self._engine.connect() as connection:
            writer = connection.execution_options(is_writer=True)
            with writer.begin():
                yield writer

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()

    @contextmanager
    def _translated(self) -> Generator[None]:
        try:
            yield
        except AdapterHubError:
            raise
        except (SQLAlchemyError, sqlite3.Error) as exc:
            self._raise_translated(exc)

    def _raise_translated(self, exc: Exception) -> NoReturn:
        cause = str(exc.orig) if isinstance(exc, DatabaseError) else str(exc)
        if "locked" in cause:
            raise OverloadedError(
                f"The catalogue {str(self._path)!r} stayed locked for {_BUSY_TIMEOUT_MS // 1000} s.",
                "Try again; if it stays so, look for a process that holds it open.",
            ) from exc
        if any(sign in cause for sign in ("malformed", "not a database", "append-only")):
            raise StoreCorruptError(
                f"The catalogue {str(self._path)!r} is damaged: {cause}.", "Restore it from a backup."
            ) from exc
        raise JobFailedError(
            f"The catalogue {str(self._path)!r} failed: {cause}.",
            "Check free space and permissions; it must be on a local disk.",
        ) from exc


def _configure(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # Transactions begin where `_begin` says, not where the driver guesses.
    connection.execute(f"PRAGMA busy_timeout = {_BUSY_TIMEOUT_MS}")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA synchronous = FULL")  # A committed version survives a power cut.


def _begin(connection: Connection) -> None:
    is_writer = connection.get_execution_options().get("is_writer", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if is_writer else "BEGIN")
