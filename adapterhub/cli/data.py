"""`hub data`: look at rows before anything is trained."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["register"]

data_app = typer.Typer(help="Training data.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add `hub data` to the command line."""
    app.add_typer(data_app, name="data")


@data_app.callback()
def data() -> None:
    """Training data."""


@data_app.command()
def check(
    file: Annotated[
        Path | None, typer.Argument(help="JSON lines; with --task, the recipe's own data by default.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Check against the recipe of this task.")] = None,
    base: Annotated[str | None, typer.Option(help="Base whose tokenizer counts tokens.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Check every row as training would, without loading a model."""
    from rich.console import Console

    from adapterhub.base.catalogue import find_base
    from adapterhub.base.loading import load_tokenizer, quiet_libraries
    from adapterhub.errors import DataError
    from adapterhub.recipes import default_recipe, load_recipe
    from adapterhub.settings import load_settings
    from trainer.data.prepare import data_file
    from trainer.data.rows import read_examples

    settings = load_settings(base=base)
    if task is None and file is None:
        raise DataError("There is nothing to check.", "Name a file of JSON lines, a task with `--task`, or both.")
    recipe = load_recipe(task, settings) if task else default_recipe("mytask", file or Path())
    file = file or data_file(recipe.data, settings)
    read_examples(file, recipe)  # Faults of rows come first; they need no base.
    found = find_base(None, settings)
    quiet_libraries()
    from trainer.console import print_report
    from trainer.data.prepare import prepare

    report = prepare(file, recipe, load_tokenizer(found)).report
    if json_:
        typer.echo(json.dumps(asdict(report), ensure_ascii=False))
    else:
        print_report(Console(), report)


@data_app.command()
def sample(
    task: Annotated[str, typer.Argument(help="A task with a recipe.")],
    rows: Annotated[int, typer.Option(min=1, help="How many.")] = 3,
    base: Annotated[str | None, typer.Option(help="Base whose tokenizer counts tokens.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="One JSON array on stdout.")] = False,
) -> None:
    """Print held-out prompts of a task with their reference answers; no adapter of the recipe was trained on them."""
    from rich.console import Console
    from rich.markup import escape

    from adapterhub.base.catalogue import find_base
    from adapterhub.base.loading import load_tokenizer, quiet_libraries
    from adapterhub.recipes import load_recipe
    from adapterhub.settings import load_settings

    settings = load_settings(base=base)
    recipe = load_recipe(task, settings)
    found = find_base(None, settings)
    quiet_libraries()
    from trainer.run import prepare_data

    chosen = prepare_data(recipe, settings=settings, tokenizer=load_tokenizer(found)).held_out[:rows]
    if json_:
        typer.echo(json.dumps([{"messages": row.messages, "reference": row.target} for row in chosen]))
        return
    for row in chosen:
        Console().print(f"{escape(row.prompt_text)}\n[bold]reference[/] {escape(row.target)}\n")
