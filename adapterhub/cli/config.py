"""`hub config`: which settings hold and where each came from."""

from __future__ import annotations

import json
from typing import Annotated

import typer

__all__ = ["register"]

config_app = typer.Typer(help="Settings.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add `hub config` to the command line."""
    app.add_typer(config_app, name="config")


@config_app.command()
def show(json_: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False) -> None:
    """Print every setting, its value and its origin: default, file, environment or command line."""
    from adapterhub.settings import provenance

    values = provenance()
    if json_:
        typer.echo(json.dumps({key: {"value": str(value), "from": origin} for key, (value, origin) in values.items()}))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("setting", "value", "from")
    for key, (value, origin) in values.items():
        table.add_row(key, str(value), origin)
    Console().print(table)
