"""What the store hands out: a version, an alias, a row of the log."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from adapterhub.records import Method

__all__ = ["Alias", "LogEntry", "Version"]


@dataclass(frozen=True, slots=True)
class Version:
    """One published, immutable version; digests are sha256 in hex."""

    task: str
    number: int
    serving_digest: str
    manifest_digest: str
    base_digest: str
    method: Method
    created_at: datetime

    @property
    def label(self) -> str:
        """The name people write, such as `summarize@v2`."""
        return f"{self.task}@v{self.number}"


@dataclass(frozen=True, slots=True)
class Alias:
    """A movable name; `generation` counts its moves and is what compare-and-swap compares."""

    task: str
    name: str
    number: int
    serving_digest: str
    generation: int
    updated_at: datetime
    updated_by: str
    reason: str

    @property
    def label(self) -> str:
        """The name people write, such as `summarize@stable`."""
        return f"{self.task}@{self.name}"

    @property
    def version_label(self) -> str:
        """The version it points to, such as `summarize@v2`."""
        return f"{self.task}@v{self.number}"


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One alias move. `hash` covers every other field, and so, through `previous_hash`, all rows before it."""

    id: int
    task: str
    alias: str
    generation: int
    previous_number: int | None
    number: int
    serving_digest: str
    manifest_digest: str
    actor: str
    reason: str
    at: str
    previous_hash: str
    hash: str
