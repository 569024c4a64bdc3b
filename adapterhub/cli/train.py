"""`hub train`: one task from its recipe, or from the user's own rows, to a published version."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from adapterhub.recipes import DataSource, Recipe
    from adapterhub.settings import Settings

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add `hub train` to the command line."""
    app.command()(train)


def train(
    task: Annotated[str, typer.Option(help="A task with a recipe, or a new name together with --data.")],
    method: Annotated[str | None, typer.Option(help="lora, dora, ia3, adalora or vera.")] = None,
    data: Annotated[str | None, typer.Option(help="JSON lines or a hub data set, in place of the recipe's.")] = None,
    base: Annotated[str | None, typer.Option(help="Base model: short name, hub id or folder.")] = None,
    quantization: Annotated[str | None, typer.Option(help="nf4, int8 or none; part of the base's identity.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of initialisation, dropout and order.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value, such as training.rank=8.")] = None,
    publish: Annotated[bool, typer.Option("--publish/--no-publish", help="Publish when the gate passes.")] = True,
    explain: Annotated[bool, typer.Option(help="Print the resolved recipe and stop.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Check the data, train an adapter, measure it against the base and publish it when it is better."""
    from adapterhub.settings import load_settings

    settings = load_settings(base=base, quantization=quantization)
    changes = _changes(set_ or [])
    if max_steps is not None:
        changes["training.max_steps"] = str(max_steps)
    if seed is not None:
        changes["training.seed"] = str(seed)
    recipe = _resolve(task, settings, method=method, data=data, changes=changes)
    if explain:
        _explain(recipe)
        return
    _run(recipe, settings, publish=publish, as_json=json_)


def _changes(items: list[str]) -> dict[str, str]:
    from adapterhub.errors import RecipeError

    changes: dict[str, str] = {}
    for item in items:
        key, sign, value = item.partition("=")
        if not sign or not key:
            raise RecipeError(f"--set {item!r} is not key=value.", "Write for example --set training.rank=8.")
        changes[key.strip()] = value
    return changes


def _resolve(task: str, settings: Settings, *, method: str | None, data: str | None, changes: dict[str, str]) -> Recipe:
    from adapterhub.recipes import default_recipe, load_recipe, parse_method, recipe_names
    from trainer.methods.profiles import fill_in

    chosen = None if method is None else parse_method(method)
    if data is not None and task not in recipe_names(settings):
        recipe = default_recipe(task, _source(data))
    else:
        recipe = load_recipe(task, settings)
        if data is not None:
            recipe = recipe.model_copy(update={"data": _source(data)})
    return fill_in(recipe.resolve(method=chosen, changes=changes))


def _source(data: str) -> DataSource:
    """A file when there is one or it is called like one; owner/name otherwise means the hub."""
    from adapterhub.recipes import DataSource

    path = Path(data)
    is_hub_id = data.count("/") == 1 and not path.exists() and path.suffix not in (".json", ".jsonl")
    return DataSource(hub=data) if is_hub_id else DataSource(file=path.absolute())


def _explain(recipe: Recipe) -> None:
    import yaml

    typer.echo(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True), nl=False)


def _run(recipe: Recipe, settings: Settings, *, publish: bool, as_json: bool) -> None:
    from rich.console import Console

    from adapterhub.base.catalogue import find_base
    from adapterhub.base.loading import quiet_libraries

    base = find_base(None, settings)
    console = Console(stderr=True)
    with console.status("starting ..."):
        quiet_libraries()
        from trainer.console import ConsoleView
        from trainer.run import publish_run, run_recipe
    from adapterhub.errors import QualityGateError

    console.print(f"[bold]{recipe.task}[/] with {recipe.method} on {base.name} ({base.quantization})")
    outcome = run_recipe(recipe, base=base, settings=settings, will_publish=publish, view=ConsoleView(console))
    version, refusal = None, None
    if publish:
        try:
            version = publish_run(outcome, base=base, settings=settings)
        except QualityGateError as error:
            refusal = error
    if as_json:
        result = {
            "task": recipe.task,
            "method": str(recipe.method),
            "version": version.label if version else None,
            "serving_digest": version.serving_digest if version else None,
            "refused": str(refusal) if refusal else None,
            "run": str(outcome.folder),
            "adapter": str(outcome.adapter),
            "evaluation": outcome.evaluation.model_dump(mode="json"),
            "train_s": outcome.training.wall_time_s,
            "train_tokens": outcome.training.num_train_tokens,
            "trainable_parameters": outcome.training.num_trainable_parameters,
        }
        typer.echo(json.dumps(result))
    if refusal is not None:
        raise refusal
    if version is not None:
        console.print(f"[bold green]published[/] {version.label}  sha256:{version.serving_digest[:16]}")
    else:
        console.print(f"not published, as asked; the adapter is in {outcome.adapter}", soft_wrap=True)
    if not as_json:
        typer.echo(version.label if version else str(outcome.adapter))
