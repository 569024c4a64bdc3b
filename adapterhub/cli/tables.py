"""Tables for people: names are never cut, long texts fold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["print_table"]


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, folding: Sequence[str] = ()) -> None:
    """Print rows on stdout, every cell on one line except in the `folding` columns."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        is_folding = column in folding
        table.add_column(column, no_wrap=not is_folding, overflow="fold", min_width=12 if is_folding else None)
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    # In a narrow window, and in a pipe, which has no width, whole names matter more than straight lines.
    console = Console()
    needed = console.measure(table, options=console.options.update(width=400)).minimum
    Console(width=max(console.width, needed), soft_wrap=True).print(table)
