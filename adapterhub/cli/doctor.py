"""`hub doctor`: what is missing on this machine and how to get it."""

from __future__ import annotations

import typer

__all__ = ["register"]

_MARKS = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "missing": "[red]missing[/]"}


def register(app: typer.Typer) -> None:
    """Add `hub doctor` to the command line."""
    app.command()(doctor)


def doctor() -> None:
    """Check Python, packages, memory, disk, base and store. Exit code 1 when something is missing."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from adapterhub.doctor import examine
    from adapterhub.settings import load_settings

    findings = examine(load_settings())
    table = Table("check", "state", "found", "what to do")
    for finding in findings:
        table.add_row(finding.subject, _MARKS[finding.state], escape(finding.detail), escape(finding.remedy))
    Console().print(table)
    raise typer.Exit(1 if any(finding.state == "missing" for finding in findings) else 0)
