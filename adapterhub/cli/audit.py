"""`hub audit`: the log of alias moves and the check of its hash chain."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from adapterhub.cli.tables import print_table

__all__ = ["register"]

audit_app = typer.Typer(help="Who moved which alias when; a log chained by hash.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout.")]


def register(app: typer.Typer) -> None:
    """Add `hub audit` to the command line."""
    app.add_typer(audit_app, name="audit")


@audit_app.command()
def log(task: Annotated[str | None, typer.Argument(help="Only this task.")] = None, json_: Json = False) -> None:
    """Print every alias move, oldest first."""
    from adapterhub.settings import load_settings
    from adapterhub.store import Store

    with Store.open(load_settings().store_dir) as store:
        entries = store.log(task)
    if json_:
        typer.echo(json.dumps([dataclasses.asdict(entry) for entry in entries]))
        return
    rows = [
        (
            str(entry.id),
            entry.at[:19].replace("T", " "),
            f"{entry.task}@{entry.alias}",
            f"{'new' if entry.previous_number is None else f'v{entry.previous_number}'} -> v{entry.number}",
            entry.serving_digest[:8],
            entry.actor,
            entry.reason,
            entry.hash[:8],
        )
        for entry in entries
    ]
    columns = ("row", "when (UTC)", "alias", "move", "digest", "by", "reason", "hash")
    print_table(columns, rows, folding=("by", "reason"))


@audit_app.command()
def verify(json_: Json = False) -> None:
    """Check the whole chain; print its length and its last hash, to be written down elsewhere."""
    from adapterhub.settings import load_settings
    from adapterhub.store import Store

    with Store.open(load_settings().store_dir) as store:
        num_rows = store.verify_log()
        entries = store.log()
    last_hash = entries[num_rows - 1].hash if entries else None
    if json_:
        typer.echo(json.dumps({"rows": num_rows, "last_hash": last_hash}))
        return
    typer.echo(f"{num_rows} rows, unbroken" + (f", last hash {last_hash}" if last_hash else ""))
