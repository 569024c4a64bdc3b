"""Choose training and held-out rows so that nothing leaks from one to the other.

Rows with equal normalised prompt, or equal group, form one cluster; a cluster goes to one side as a whole. The order of
clusters is a hash of the seed and of the rows as read, so neither the order of the file nor another prompt moves rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from typing import Protocol, TypeVar

from adapterhub.errors import DataError
from adapterhub.recipes import Split

__all__ = ["deduplicate", "normalise", "split_rows"]

_MIN_TRAIN_ROWS = 1
_MIN_EVAL_ROWS = 2  # A paired interval needs two differences.


class _Row(Protocol):
    @property
    def prompt_text(self) -> str: ...
    @property
    def target(self) -> str: ...
    @property
    def group(self) -> str | None: ...
    @property
    def row_digest(self) -> str: ...


_R = TypeVar("_R", bound=_Row)


def normalise(text: str) -> str:
    """Fold case and white space, so that trivially different copies of a prompt count as equal."""
    return " ".join(text.casefold().split())


def deduplicate(rows: Sequence[_R]) -> list[_R]:
    """Keep the first of the rows with equal normalised prompt and target."""
    first: dict[Hashable, _R] = {}
    for row in rows:
        first.setdefault((normalise(row.prompt_text), normalise(row.target)), row)
    return list(first.values())


def split_rows(rows: Sequence[_R], split: Split) -> tuple[list[_R], list[_R]]:
    """Return (training rows, held-out rows). Raises DataError when there are too few for both."""
    wanted = split.eval or max(_MIN_EVAL_ROWS, round(split.eval_fraction * len(rows)))
    held_out: list[_R] = []
    train: list[_R] = []
    for cluster in _ordered_clusters(rows, split.seed):
        if len(held_out) + len(cluster) <= wanted:
            held_out += cluster
        elif split.train is None or len(train) < split.train:
            train += cluster
    if len(held_out) < wanted or len(train) < _MIN_TRAIN_ROWS:
        raise DataError(
            f"{len(rows)} usable rows give {len(train)} for training and {len(held_out)} of {wanted} held out.",
            "Add rows, lower `split.eval`, or check that `split.group` and equal prompts do not tie all rows together.",
        )
    # The first rows of either side must be a sample of all its groups, so groups do not stay together here.
    held_out.sort(key=lambda row: _place(row, split.seed))
    return sorted(train[: split.train], key=lambda row: _place(row, split.seed)), held_out


def _ordered_clusters(rows: Sequence[_R], seed: int) -> list[list[_R]]:
    parent = list(range(len(rows)))

    def root(idx: int) -> int:
        while parent[idx] != idx:
            parent[idx] = parent[parent[idx]]
            idx = parent[idx]
        return idx

    seen: dict[Hashable, int] = {}
    for idx, row in enumerate(rows):
        keys: list[Hashable] = [("prompt", normalise(row.prompt_text))]
        if row.group is not None:
            keys.append(("group", row.group))
        for key in keys:
            parent[root(idx)] = root(seen.setdefault(key, idx))
    clusters: dict[int, list[_R]] = {}
    for idx, row in enumerate(rows):
        clusters.setdefault(root(idx), []).append(row)
    for cluster in clusters.values():
        cluster.sort(key=lambda row: _place(row, seed))
    return sorted(clusters.values(), key=lambda cluster: _place(cluster[0], seed))


def _place(row: _Row, seed: int) -> str:
    return hashlib.sha256(f"{seed}\0{row.row_digest}".encode()).hexdigest()
