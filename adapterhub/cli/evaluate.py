"""`hub eval`: measure a published version on held-out rows."""

from __future__ import annotations

import json
from typing import Annotated

import typer

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add `hub eval` to the command line."""
    app.command("eval")(evaluate)


def evaluate(
    ref: Annotated[str, typer.Argument(help="task, task@v2, task@alias or a digest.")],
    against: Annotated[str, typer.Option(help="base, or another reference.")] = "base",
    rows: Annotated[int | None, typer.Option(help="How many held-out rows; all by default.")] = None,
    seed: Annotated[int | None, typer.Option(help="Draw the rows at random with this seed.")] = None,
    base: Annotated[str | None, typer.Option(help="Base model: short name, hub id or folder.")] = None,
    quantization: Annotated[str | None, typer.Option(help="nf4, int8 or none.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Compare a version with the base, or with another version, on rows it was not trained on."""
    from rich.console import Console

    from adapterhub.base.catalogue import find_base
    from adapterhub.base.loading import quiet_libraries
    from adapterhub.settings import load_settings
    from adapterhub.store import Store

    settings = load_settings(base=base, quantization=quantization)
    found = find_base(None, settings)
    store = Store.open(settings.store_dir)
    try:
        store.get_version(ref)  # A wrong name is told before the seconds that the imports take.
        stderr = Console(stderr=True)
        quiet_libraries()
        from trainer.console import print_evaluation
        from trainer.progress import live_evaluation
        from trainer.reevaluate import reevaluate

        with live_evaluation(stderr) as on_rows:
            result = reevaluate(
                ref,
                against=against,
                base=found,
                store=store,
                settings=settings,
                num_rows=rows,
                seed=seed,
                on_rows=on_rows,
            )
    finally:
        store.close()
    for warning in result.warnings:
        stderr.print(f"[yellow]warning[/] {warning}")
    record = result.comparison.record
    if json_:
        typer.echo(json.dumps({"adapter": result.second, "against": result.first, **record.model_dump(mode="json")}))
    else:
        print_evaluation(
            Console(), record, max_new_tokens=result.max_new_tokens, first=result.first, second=result.second
        )
