"""Find recipes by task: the shipped ones in `adapters/<task>/recipe.yaml` and the user's own, which win."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from adapterhub.errors import InvalidNameError, RecipeError, SettingsError, UnknownMethodError, UnknownTaskError
from adapterhub.recipes.model import DataSource, Recipe, is_task_name, parse_recipe
from adapterhub.records import Method
from adapterhub.settings import Settings

__all__ = ["default_recipe", "load_recipe", "parse_method", "recipe_names"]

_FILE_NAME = "recipe.yaml"


def parse_method(name: str) -> Method:
    """Return the method called `name`. Raises UnknownMethodError with near matches."""
    try:
        return Method(name.lower())
    except ValueError:
        raise UnknownMethodError.named(name, [str(method) for method in Method]) from None


def _recipe_files(settings: Settings) -> dict[str, Any]:
    """Task -> recipe file, shipped ones first so that the user's folder wins. Raises SettingsError without it."""
    found: dict[str, Any] = {}
    roots: list[Any] = [resources.files("adapters")]
    if settings.recipes is not None:
        if not settings.recipes.is_dir():
            raise SettingsError(
                f"There is no recipe folder {str(settings.recipes)!r}.",
                "Set ADAPTERHUB_RECIPES to a folder of <task>/recipe.yaml, or leave it out.",
            )
        roots.append(settings.recipes)
    for root in roots:
        if root.is_dir():
            found |= {entry.name: entry / _FILE_NAME for entry in root.iterdir() if (entry / _FILE_NAME).is_file()}
    return found


def recipe_names(settings: Settings) -> list[str]:
    """Tasks that have a recipe, shipped or in `settings.recipes`."""
    return sorted(_recipe_files(settings))


def load_recipe(task: str, settings: Settings) -> Recipe:
    """Read the recipe of a task. Raises UnknownTaskError with near matches, RecipeError for a wrong file."""
    files = _recipe_files(settings)
    if task not in files:
        raise UnknownTaskError.named(task, files)
    file = files[task]
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        raise RecipeError(f"{file} is not valid YAML: {exc}.", "Correct the file.") from exc
    recipe = parse_recipe(raw, where=str(file))
    if recipe.task != task:
        raise RecipeError(f"{file} says task: {recipe.task!r}.", f"Write task: {task} or rename the folder.")
    if recipe.data.file is not None and isinstance(file, Path):
        data = recipe.data.model_copy(update={"file": file.parent / recipe.data.file})
        recipe = recipe.model_copy(update={"data": data})
    return recipe


def default_recipe(task: str, data: DataSource | Path) -> Recipe:
    """Return the recipe for the user's own rows, which bring their prompts: ROUGE-L, one row in ten held out."""
    if not is_task_name(task):
        raise InvalidNameError(
            f"{task!r} is not a task name.", "Use a lower-case letter, then at most 62 of a-z, 0-9, _ and -."
        )
    source = DataSource(file=data.absolute()) if isinstance(data, Path) else data
    return Recipe(task=task, description="The user's own rows.", data=source)
