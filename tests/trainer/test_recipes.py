from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from adapterhub.errors import InvalidNameError, RecipeError, SettingsError, UnknownMethodError, UnknownTaskError
from adapterhub.recipes import DataSource, default_recipe, load_recipe, parse_method, parse_recipe, recipe_names
from adapterhub.records import Method
from adapterhub.settings import load_settings
from trainer.methods.profiles import PROFILES, fill_in

RAW: dict[str, Any] = {
    "task": "ask",
    "data": {"file": "rows.jsonl"},
    "fields": {"passage": "text", "answer": {"column": "label", "values": {True: "yes", False: "no"}}},
    "prompt": {"template": "{passage}?", "truncate": {"passage": 10}},
    "target": "{answer}",
    "metric": "accuracy",
    "labels": ["yes", "no"],
    "training": {"rank": 4, "learning_rate": 0.001},
    "methods": {"ia3": {"learning_rate": 0.02}},
}


def recipe_with(**changes: Any):
    return parse_recipe(RAW | changes, where="r.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainning": {}}, "r.yaml: unknown key 'trainning'. Did you mean 'training'?"),
        ({"training": {"max_step": 3}}, "r.yaml: unknown key 'training.max_step'. Did you mean 'max_steps'?"),
        ({"methods": {"ia3": {"rnk": 3}}}, "r.yaml: unknown key 'methods.ia3.rnk'. Did you mean 'rank'?"),
        ({"methods": {"lorra": {}}}, "Input should be 'lora', 'dora', 'ia3', 'adalora' or 'vera'"),
        ({"prompt": {"template": "{pasage}"}}, "variable 'pasage' is not among fields. Did you mean 'passage'?"),
        ({"prompt": {"template": "{passage"}}, "template '{passage' does not parse"),
        ({"prompt": {"template": "{passage!r}"}}, "is not a plain variable; write {{ and }} for braces"),
        ({"metric": "f1"}, "metric is 'f1': Input should be 'rouge_l', 'accuracy' or 'number'"),
        ({"labels": []}, "metric accuracy needs labels"),
        ({"target": None}, "prompt.template and target go together"),
        ({"data": {}}, "give exactly one of asset, file, hub; found none"),
        ({"data": {"file": "a", "asset": "b"}}, "give exactly one of asset, file, hub; found asset, file"),
        ({"task": "Ask me"}, "task is 'Ask me': a task is a lower-case letter"),
        ({"gate": {"confidence": 2}}, "gate.confidence is 2: Input should be less than 1"),
        ({"fields": {"passage": {"column": "t", "pattern": "("}}}, "not a regular expression"),
        ({"training": {"seed": -1}}, "training.seed is -1: Input should be greater than or equal to 0"),
        (
            {"training": {"seed": 2**32}},
            "training.seed is 4294967296: Input should be less than 4294967296",
        ),
        ({"split": {"seed": -1}}, "split.seed is -1: Input should be greater than or equal to 0"),
        ({"methods": {"ia3": {"seed": -1}}}, "methods.ia3.seed is -1"),
        (
            {"training": {"learning_rate": float("inf")}},
            "training.learning_rate is inf: Input should be a finite number",
        ),
        ({"gate": {"min_gain": float("nan")}}, "gate.min_gain is nan: Input should be a finite number"),
        (
            {"prompt": RAW["prompt"] | {"truncate": {"passage": 0}}},
            "prompt.truncate.passage is 0: Input should be greater",
        ),
        ({"filter": {"max_tokens": {"passage": -1}}}, "filter.max_tokens.passage is -1: Input should be greater"),
        ({"filter": {"min_tokens": {"passage": 0}}}, "filter.min_tokens.passage is 0: Input should be greater"),
    ],
)
def test_a_wrong_recipe_names_key_value_and_choices(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_with(**changes)
    assert message in str(caught.value)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(RecipeError, match=r"r.yaml: key 'task' is missing. Add it"):
        parse_recipe({"data": {"file": "x"}}, where="r.yaml")


def test_yaml_booleans_in_values_are_read_as_the_text_in_the_data() -> None:
    assert recipe_with().fields["answer"].values == {"True": "yes", "False": "no"}


def test_resolve_keeps_the_choices_for_the_own_method_and_applies_changes() -> None:
    recipe = recipe_with().resolve(changes={"training.max_steps": "7", "prompt.truncate.passage": "3"})
    assert (recipe.training.rank, recipe.training.learning_rate, recipe.training.max_steps) == (4, 0.001, 7)
    assert recipe.prompt.truncate == {"passage": 3}


def test_resolve_starts_another_method_from_its_own_profile_and_overrides() -> None:
    ia3 = fill_in(recipe_with().resolve(method=Method.IA3))
    assert (ia3.training.rank, ia3.training.learning_rate) == (None, 0.02)
    vera = fill_in(recipe_with().resolve(method=Method.VERA))
    assert vera.training.learning_rate == PROFILES[Method.VERA].learning_rate
    assert vera.training.rank == PROFILES[Method.VERA].rank


def test_resolving_a_resolved_recipe_changes_nothing() -> None:
    once = fill_in(recipe_with().resolve(method=Method.IA3))
    assert fill_in(parse_recipe(once.model_dump(mode="json"), where="again").resolve()) == once


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": "3"}, "Unknown recipe key 'rank'. Did you mean 'training.rank'?"),
        ({"training.rnk": "3"}, "Unknown recipe key 'training.rnk'. Did you mean 'training.rank'?"),
        ({"nonsense": "3"}, "Unknown recipe key 'nonsense'. Allowed: task, description, data.asset"),
        ({"method": "vera"}, "--set cannot change 'method'. Use `--method`"),
        ({"task": "other"}, "--set cannot change 'task'. Use `--task`"),
        ({"methods": "{lora: {rank: 3}}"}, "--set cannot change 'methods'. Change `training`"),
        ({"gate.min_gain": ".nan"}, "gate.min_gain is nan: Input should be a finite number"),
        ({"gate.min_gain": "abc"}, "gate.min_gain is 'abc': Input should be a valid number"),
        ({"training.rank": "[1"}, "The value of 'training.rank' is not YAML: '[1'."),
    ],
)
def test_a_wrong_change_names_key_and_near_match(changes: dict[str, str], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_with().resolve(changes=changes)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rank", "8", "Method 'ia3' has no rank, but training.rank is 8. Leave training.rank out."),
        ("alpha", "8", "Method 'ia3' has no alpha, but training.alpha is 8.0."),
        ("rank_stabilized", "true", "training.rank_stabilized is not known to method 'ia3'."),
        ("dropout", "0.1", "Method 'ia3' has no dropout, but training.dropout is 0.1. Set `methods.ia3.dropout` to 0."),
    ],
)
def test_a_key_the_method_cannot_use_is_refused(key: str, value: str, message: str) -> None:
    recipe = recipe_with().resolve(method=Method.IA3, changes={f"training.{key}": value})
    with pytest.raises(RecipeError) as caught:
        fill_in(recipe)
    assert message in str(caught.value)


def test_unknown_method_names_the_methods() -> None:
    with pytest.raises(UnknownMethodError) as caught:
        parse_method("lorra")
    assert (
        str(caught.value)
        == "Unknown adapter method 'lorra'; allowed: adalora, dora, ia3, lora, vera. Did you mean 'lora'?"
    )


def test_unknown_task_names_the_near_one() -> None:
    with pytest.raises(UnknownTaskError, match=r"No recipe for task 'sumarize'.*Did you mean 'summarize'"):
        load_recipe("sumarize", load_settings())


@pytest.mark.parametrize("task", recipe_names(load_settings()))
def test_every_shipped_recipe_reads_and_resolves_for_every_method(task: str) -> None:
    recipe = load_recipe(task, load_settings())
    assert recipe.split.eval is not None
    assert recipe.split.eval >= max(200, recipe.gate.num_rows)
    for method in Method:
        assert fill_in(recipe.resolve(method=method)).training.learning_rate


def test_a_recipe_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        recipe_names(load_settings(recipes=tmp_path / "nowhere"))
    assert str(caught.value) == (
        f"There is no recipe folder {str(tmp_path / 'nowhere')!r}. "
        "Set ADAPTERHUB_RECIPES to a folder of <task>/recipe.yaml, or leave it out."
    )


def test_own_recipes_win_and_their_files_start_at_their_folder(tmp_path: Path) -> None:
    folder = tmp_path / "ask"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RAW), encoding="utf-8")
    settings = load_settings(recipes=tmp_path)
    assert "ask" in recipe_names(settings)
    assert load_recipe("ask", settings).data.file == folder / "rows.jsonl"


@pytest.mark.parametrize(
    ("text", "message"),
    [("task: [", "is not valid YAML"), ("task: other\ndata: {file: x}", "says task: 'other'. Write task: ask")],
)
def test_a_broken_recipe_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "ask").mkdir()
    (tmp_path / "ask" / "recipe.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe("ask", load_settings(recipes=tmp_path))
    assert message in str(caught.value)
    assert "recipe.yaml" in str(caught.value)


def test_a_default_recipe_needs_a_task_name() -> None:
    with pytest.raises(InvalidNameError, match=r"'My task' is not a task name. Use a lower-case letter"):
        default_recipe("My task", Path("x.jsonl"))
    assert default_recipe("mytask", DataSource(hub="a/b")).data.hub == "a/b"
