"""Run a step so that a row that makes it fail fails alone: halve the rows until the guilty ones are by themselves.

A row writes the same keys and values however often it runs, so rows may run again. Knows rows and logits, no requests.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor

__all__ = ["run_isolated"]

_log = logging.getLogger(__name__)
_R = TypeVar("_R")


def run_isolated(
    run: Callable[[Sequence[_R]], Tensor], rows: Sequence[_R]
) -> list[tuple[Sequence[_R], Tensor | Exception]]:
    """Run all rows at once; if that fails, each half by itself, down to single rows.

    run: returns the logits (len(rows), V) of some rows or raises. Return pairs of consecutive rows and their logits, or
    of one row and the reason why it cannot be run; together they are all rows, in order.
    """
    try:
        return [(rows, run(rows))]
    except Exception as exc:  # The requests of the guilty rows end; the next step may be fine.
        _log.warning("%d rows cannot run together: %s", len(rows), exc, exc_info=len(rows) == 1)
        if len(rows) == 1:
            return [(rows, exc)]
    half = len(rows) // 2
    return [*run_isolated(run, rows[:half]), *run_isolated(run, rows[half:])]
