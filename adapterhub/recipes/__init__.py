"""Recipes: what a task trains on, how it asks, how it is measured, and what it must gain to be published."""

from __future__ import annotations

from adapterhub.recipes.load import default_recipe, load_recipe, parse_method, recipe_names
from adapterhub.recipes.model import (
    METHOD_KEYS,
    DataSource,
    FieldSource,
    Filter,
    Gate,
    Generation,
    Prompt,
    Recipe,
    Split,
    Training,
    TrainingChanges,
    parse_recipe,
)

__all__ = [
    "METHOD_KEYS",
    "DataSource",
    "FieldSource",
    "Filter",
    "Gate",
    "Generation",
    "Prompt",
    "Recipe",
    "Split",
    "Training",
    "TrainingChanges",
    "default_recipe",
    "load_recipe",
    "parse_method",
    "parse_recipe",
    "recipe_names",
]
