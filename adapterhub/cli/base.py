"""`hub base`: bring a base model here and list those known."""

from __future__ import annotations

import json
from typing import Annotated

import typer

__all__ = ["register"]

base_app = typer.Typer(help="The frozen base models.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add `hub base` to the command line."""
    app.add_typer(base_app, name="base")


@base_app.command()
def pull(
    name: Annotated[
        str | None, typer.Argument(help="Short name, hub id or folder; the configured base by default.")
    ] = None,
    quantization: Annotated[str | None, typer.Option(help="nf4, int8 or none; part of the digest.")] = None,
) -> None:
    """Fetch a base, check it, convert it to safetensors and print its digest."""
    from rich.console import Console

    from adapterhub.base.catalogue import pull_base
    from adapterhub.settings import load_settings

    settings = load_settings(quantization=quantization)
    stderr = Console(stderr=True)
    with stderr.status(f"Pulling base {name or settings.base} ..."):
        base = pull_base(name, settings)
    stderr.print(f"{base.name}: {len(base.modules)} linears, context {base.context_tokens} tokens, {base.quantization}")
    stderr.print(f"  in {base.folder}", soft_wrap=True)
    typer.echo(base.digest)


@base_app.command("list")
def list_(json_: Annotated[bool, typer.Option("--json", help="One JSON array on stdout.")] = False) -> None:
    """List the bases of the catalogue and those already pulled."""
    from adapterhub.base.catalogue import list_bases
    from adapterhub.settings import load_settings

    listings = list_bases(load_settings())
    if json_:
        rows = [
            {"name": b.name, "pulled": b.is_pulled, "folder": str(b.folder), "licence": b.licence} for b in listings
        ]
        typer.echo(json.dumps(rows))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("base", "here", "licence", "folder")
    for listing in listings:
        here = "yes" if listing.is_pulled else f"no: hub base pull {listing.name}"
        table.add_row(listing.name, here, listing.licence, str(listing.folder) if listing.is_pulled else "")
    Console().print(table)
