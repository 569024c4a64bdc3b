from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner, Result

from adapterhub.base import Base
from adapterhub.cli import data, evaluate, train
from adapterhub.errors import (
    AdapterHubError,
    AdapterNotFoundError,
    BaseNotPulledError,
    DataError,
    InvalidNameError,
    QualityGateError,
    RecipeError,
    UnknownMethodError,
    UnknownTaskError,
)
from tests.support.tiny_models import build_base
from tests.support.training import write_jsonl, write_task

SMALL = ["--set", "generation.max_new_tokens=8", "--set", "split.eval=20", "--set", "gate.num_rows=20"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return build_base(tmp_path_factory.mktemp("base"), quantization="nf4")


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, base: Base) -> None:
    monkeypatch.setenv("ADAPTERHUB_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ADAPTERHUB_BASE", str(base.folder))
    monkeypatch.setenv("ADAPTERHUB_THREADS", "1")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_task(tmp_path / "rows.jsonl")


def hub(*arguments: str) -> Result:
    app = typer.Typer()
    for module in (train, evaluate, data):
        module.register(app)
    return CliRunner().invoke(app, arguments)


def refused(*arguments: str) -> AdapterHubError:
    error = hub(*arguments).exception
    assert isinstance(error, AdapterHubError)
    return error


def test_own_rows_become_a_published_version_that_can_be_measured_again(rows: Path) -> None:
    result = hub("train", "--task", "mytask", "--data", str(rows), "--max-steps", "30", "--seed", "3", *SMALL)
    assert result.exit_code == 0, result.output
    assert result.stdout == "mytask@v1\n"
    for part in ("40 rows read; 20 train, 20 held out", "ok ok<|im_end|>", "tokens/s", "base", "adapter", "paired t"):
        assert part in result.stderr
    assert "published mytask@v1" in result.stderr

    measured = json.loads(hub("eval", "mytask@v1", "--json").stdout)
    assert (measured["adapter"], measured["against"], measured["num_rows"]) == ("mytask@v1", "base", 20)
    assert measured["interval_low"] > 0
    table = hub("eval", "mytask", "--against", "mytask@v1", "--rows", "4").stdout
    assert "rouge_l on 4 held-out rows" in table
    assert "+0.0000" in table


def test_json_reports_a_refused_run_too_and_the_exit_code_is_one(rows: Path) -> None:
    options = ["--max-steps", "2", "--set", "training.learning_rate=1e-6", "--json", *SMALL]
    result = hub("train", "--task", "mytask", "--data", str(rows), "--method", "dora", *options)
    assert isinstance(result.exception, QualityGateError)
    assert result.exception.exit_code == 1
    report = json.loads(result.stdout)
    assert report["version"] is None
    assert "was not published" in report["refused"]
    assert Path(report["adapter"], "adapter_model.safetensors").is_file()
    assert report["method"] == "dora"


def test_no_publish_keeps_the_adapter_and_prints_its_folder(rows: Path) -> None:
    result = hub("train", "--task", "mytask", "--data", str(rows), "--max-steps", "2", "--no-publish", *SMALL)
    assert result.exit_code == 0, result.output
    assert Path(result.stdout.strip(), "adapter_config.json").is_file()


def test_explain_prints_the_resolved_recipe_and_trains_nothing() -> None:
    result = hub("train", "--task", "summarize", "--method", "vera", "--set", "training.batch_size=4", "--explain")
    recipe = yaml.safe_load(result.stdout)
    assert (recipe["method"], recipe["training"]["rank"], recipe["training"]["batch_size"]) == ("vera", 256, 4)


def test_wrong_arguments_are_named(rows: Path) -> None:
    assert isinstance(refused("train", "--task", "sumarize"), UnknownTaskError)
    assert isinstance(refused("train", "--task", "summarize", "--method", "lorra"), UnknownMethodError)
    assert isinstance(refused("train", "--task", "My task", "--data", str(rows)), InvalidNameError)
    error = refused("train", "--task", "summarize", "--set", "rank")
    assert isinstance(error, RecipeError)
    assert str(error) == "--set 'rank' is not key=value. Write for example --set training.rank=8."
    missing = refused("train", "--task", "mytask", "--data", "nowhere.jsonl")
    assert isinstance(missing, DataError)
    assert "There is no data file" in str(missing)
    negative = refused("train", "--task", "summarize", "--seed", "-1")
    assert "training.seed is -1: Input should be greater than or equal to 0" in str(negative)
    assert isinstance(refused("train", "--task", "summarize", "--base", "nobase"), BaseNotPulledError)
    assert isinstance(refused("eval", "summarise"), AdapterNotFoundError)


def test_data_check_reports_rows_tokens_and_mask(rows: Path) -> None:
    result = hub("data", "check", str(rows))
    assert result.exit_code == 0, result.output
    assert "40 rows read; 36 train, 4 held out" in result.stdout
    report = json.loads(hub("data", "check", str(rows), "--json").stdout)
    assert (report["num_rows"], report["sample_answer"]) == (40, "ok ok<|im_end|>")


def test_data_check_names_bad_rows_even_without_a_base(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "a", "completion": "b"}, "{"])
    error = refused("data", "check", str(path), "--base", "nobase")
    assert isinstance(error, DataError)
    assert f"{path}:2: malformed JSON" in str(error)
    assert error.exit_code == 2
    error = refused("data", "check", str(path), "--task", "summarize")
    assert f"{path}:1: column 'document' is missing; the row has: prompt, completion" in str(error)


def test_data_sample_prints_held_out_prompts_and_references(
    tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {"task": "mytask", "data": {"file": str(rows)}, "split": {"eval": 8}}
    (tmp_path / "recipes" / "mytask").mkdir(parents=True)
    (tmp_path / "recipes" / "mytask" / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    monkeypatch.setenv("ADAPTERHUB_RECIPES", str(tmp_path / "recipes"))
    sampled = json.loads(hub("data", "sample", "mytask", "--rows", "2", "--json").stdout)
    assert [row["reference"] for row in sampled] == ["ok ok", "ok ok"]
    assert sampled[0]["messages"][0]["content"].startswith("row ")
    assert "reference ok ok" in hub("data", "sample", "mytask", "--rows", "1").stdout


def test_data_check_wants_a_file_or_a_task() -> None:
    assert "Name a file of JSON lines, a task with `--task`, or both." in str(refused("data", "check"))
