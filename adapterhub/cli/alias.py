"""`hub alias`: see and move aliases such as `summarize@stable`."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adapterhub.cli.tables import print_table

if TYPE_CHECKING:
    from adapterhub.store import Alias

__all__ = ["register"]

alias_app = typer.Typer(help="Movable names of versions, such as summarize@stable.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout.")]


def register(app: typer.Typer) -> None:
    """Add `hub alias` to the command line."""
    app.add_typer(alias_app, name="alias")


def _alias_json(alias: Alias) -> dict[str, Any]:
    fields = dataclasses.asdict(alias) | {"updated_at": alias.updated_at.isoformat()}
    return {"label": alias.label, "version": fields.pop("number")} | fields


@alias_app.command("list")
def list_(task: Annotated[str | None, typer.Argument(help="Only this task.")] = None, json_: Json = False) -> None:
    """List aliases, where they point and who moved them last."""
    from adapterhub.settings import load_settings
    from adapterhub.store import Store

    with Store.open(load_settings().store_dir) as store:
        aliases = store.aliases(task)
        if task is not None and not aliases:
            store.get_version(task)  # Says which tasks there are.
    if json_:
        typer.echo(json.dumps([_alias_json(alias) for alias in aliases]))
        return
    rows = [
        (
            one.label,
            one.version_label,
            str(one.generation),
            f"{one.updated_at:%Y-%m-%d %H:%M}",
            one.updated_by,
            one.reason,
        )
        for one in aliases
    ]
    print_table(("alias", "version", "generation", "moved (UTC)", "by", "reason"), rows, folding=("by", "reason"))


@alias_app.command("set")
def set_(
    alias: Annotated[str, typer.Argument(help="task@alias, such as summarize@stable.")],
    version: Annotated[str, typer.Argument(help="Version of the same task: summarize@v2, or just v2.")],
    reason: Annotated[str, typer.Option(help="Why; kept in the log.")] = "set on the command line",
    actor: Annotated[str, typer.Option(help="Who; kept in the log.")] = "cli",
    generation: Annotated[
        int | None, typer.Option(help="Move only if the alias is still at this generation; 0: must not exist yet.")
    ] = None,
    json_: Json = False,
) -> None:
    """Point an alias to a version. Running servers follow within a second."""
    from adapterhub.settings import load_settings
    from adapterhub.store import Store

    with Store.open(load_settings().store_dir) as store:
        moved = store.point_alias(alias, version, generation=generation, actor=actor, reason=reason)
    label = f"{moved.label} -> {moved.version_label}"
    typer.echo(json.dumps(_alias_json(moved)) if json_ else f"{label} (generation {moved.generation})")
