from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adapterhub.base import Base
from adapterhub.errors import (
    AdapterHubError,
    AdapterNotFoundError,
    BaseMismatchError,
    DataError,
    QualityGateError,
    RecipeError,
    SettingsError,
)
from adapterhub.settings import Settings, load_settings
from adapterhub.store import Store
from tests.support.adapters import write_adapter
from tests.support.tiny_models import build_base
from tests.support.training import tiny_recipe, write_task
from trainer.lineage import code_revision
from trainer.reevaluate import reevaluate
from trainer.run import RunOutcome, publish_run, run_recipe


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return build_base(tmp_path_factory.mktemp("base"), quantization="nf4")


@pytest.fixture
def settings(tmp_path: Path, base: Base) -> Settings:
    return load_settings(home=tmp_path / "home", base=str(base.folder), threads=1)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_task(tmp_path / "rows.jsonl")


def run(rows: Path, base: Base, settings: Settings, **changes: Any) -> RunOutcome:
    return run_recipe(tiny_recipe(data=rows, **changes), base=base, settings=settings)


def test_a_run_beats_the_base_and_is_published_with_its_evidence(rows: Path, base: Base, settings: Settings) -> None:
    outcome = run(rows, base, settings, training__max_steps=50)
    assert outcome.evaluation.base_score < 0.1
    assert outcome.evaluation.adapter_score > 0.8
    version = publish_run(outcome, base=base, settings=settings)
    assert version.label == "tiny@v1"

    store = Store.open(settings.store_dir)
    manifest = store.manifest(store.get_version("tiny"))
    store.close()
    assert manifest.evaluation == outcome.evaluation
    assert manifest.training == outcome.training
    training = outcome.training
    assert training.code_revision == code_revision()
    assert set(training.data_digests) == {"rows.jsonl"}
    assert len(training.metrics) == 50
    assert training.packages["peft"]
    assert training.hardware["num_threads"] == "1"
    assert training.num_train_tokens > 0
    run_json = json.loads((outcome.folder / "run.json").read_text())
    assert run_json["training"]["recipe"]["training"]["rank"] == 16
    assert run_json["base"]["digest"] == base.digest
    answers = json.loads((outcome.folder / "evaluation.json").read_text())["rows"]
    assert len(answers) == 20
    assert sum(row["adapter"] == "ok ok" for row in answers) >= 10
    assert sorted(path.name for path in outcome.folder.iterdir()) == ["adapter", "evaluation.json", "run.json"]


def test_a_run_that_gains_nothing_is_kept_but_not_published(rows: Path, base: Base, settings: Settings) -> None:
    outcome = run(rows, base, settings, training__max_steps=2, training__learning_rate=1e-6)
    with pytest.raises(QualityGateError, match=r"'tiny' was not published: rouge_l changed by .* is kept in"):
        publish_run(outcome, base=base, settings=settings)
    assert (outcome.adapter / "adapter_model.safetensors").is_file()
    assert not Store.open(settings.store_dir).versions()


def test_a_run_repeats_from_its_record_bit_by_bit(rows: Path, base: Base, settings: Settings) -> None:
    first = run(rows, base, settings, training__max_steps=6)
    torch.manual_seed(99)
    again = run(rows, base, settings, training__max_steps=6)
    weights = [(o.adapter / "adapter_model.safetensors").read_bytes() for o in (first, again)]
    assert first.folder != again.folder
    assert weights[0] == weights[1]
    assert first.evaluation == again.evaluation
    assert first.training.token_digest == again.training.token_digest


def test_the_base_answers_the_same_rows_once(
    rows: Path, base: Base, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(rows, base, settings, training__max_steps=2)
    monkeypatch.setattr("trainer.evaluate.generate_answers", None)  # Asking the base again would fail.
    again = run(rows, base, settings, training__max_steps=2)
    assert first.evaluation.base_score == again.evaluation.base_score
    with pytest.raises(TypeError):
        run(rows, base, settings, training__max_steps=2, generation__max_new_tokens=4)


def test_bad_data_stops_the_run_before_a_model_loads(
    tmp_path: Path, base: Base, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.run.load_model", None)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"bad\.jsonl:1: column 'completion' is missing"):
        run(bad, base, settings)
    assert not settings.runs_dir.exists()


def test_what_cannot_be_published_or_kept_stops_the_run_before_a_model_loads(
    rows: Path, base: Base, settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("trainer.run.load_model", None)
    few = tiny_recipe(data=rows, split__eval=19)
    with pytest.raises(
        DataError, match=r"'tiny' measures on 19 held-out rows, but publishing needs 20\. Hold out more"
    ):
        run_recipe(few, base=base, settings=settings, will_publish=True)
    taken = settings.model_copy(update={"home": tmp_path / "file"})
    taken.home.touch()
    with pytest.raises(
        SettingsError, match=r"The run folder '.*' cannot be made: Not a dir.* Set ADAPTERHUB_HOME to a"
    ):
        run_recipe(few, base=base, settings=taken)
    with pytest.raises(AdapterHubError, match="the store in"):
        run_recipe(few, base=base, settings=taken, will_publish=True)


def test_what_the_base_cannot_do_stops_the_run_before_the_data_is_read(base: Base, settings: Settings) -> None:
    with pytest.raises(
        RecipeError, match=r"max_length is 513, but base .* reads 512 tokens\. Use `--set training\.max"
    ):
        run(Path("nowhere"), base, settings, training__max_length=513)
    with pytest.raises(RecipeError, match=r"names 'q_prj', which base .* lacks"):
        run(Path("nowhere"), base, settings, training__target_modules=["q_prj"])
    with pytest.raises(RecipeError, match=r"AdaLoRA cannot cut ranks"):
        run_recipe(tiny_recipe("adalora", training__max_steps=3), base=base, settings=settings)


def test_measuring_again_uses_the_threads_of_the_settings(base: Base, settings: Settings) -> None:
    store = Store.open(settings.store_dir)
    torch.set_num_threads(2)
    with pytest.raises(AdapterNotFoundError):
        reevaluate("tiny", against="base", base=base, store=store, settings=settings)
    assert torch.get_num_threads() == 1
    store.close()


def test_a_published_version_is_measured_again_on_rows_it_never_saw(rows: Path, base: Base, settings: Settings) -> None:
    outcome = run(rows, base, settings)
    publish_run(outcome, base=base, settings=settings)
    store = Store.open(settings.store_dir)
    options: dict[str, Any] = {"base": base, "store": store, "settings": settings}
    result = reevaluate("tiny", against="base", **options)
    assert (result.first, result.second) == ("base", "tiny@v1")
    assert result.comparison.record == outcome.evaluation
    part = reevaluate("tiny", against="base", num_rows=4, seed=3, **options)
    assert (part.comparison.record.num_rows, part.comparison.record.seed) == (4, 3)
    with pytest.raises(DataError, match=r"--rows is 21, but this version has 20 held-out rows\. Use 2 to 20"):
        reevaluate("tiny", against="base", num_rows=21, **options)
    with pytest.raises(BaseMismatchError, match=r"tiny@v1 was trained on base .* Choose its base with `--base`"):
        reevaluate("tiny", against="base", **(options | {"base": replace(base, digest="0" * 64)}))

    second = run(rows, base, settings, training__seed=5, split__seed=1)
    publish_run(second, base=base, settings=settings)
    both = reevaluate("tiny@v2", against="tiny@v1", **options)
    assert (both.first, both.second, len(both.warnings)) == ("tiny@v1", "tiny@v2", 1)
    lines = [
        {row["line"] for row in json.loads((o.folder / "evaluation.json").read_text())["rows"]}
        for o in (outcome, second)
    ]  # Each run trained on the 20 of 40 rows that it did not hold out.
    num_seen = len(lines[1] - lines[0])
    assert both.warnings == (f"tiny@v1 was trained on {num_seen} of these 20 rows.",)
    assert not reevaluate("tiny@v1", against="tiny@v1", **options).warnings
    assert both.comparison.record.difference == pytest.approx(0, abs=0.05)
    store.close()


def test_a_version_whose_rows_have_changed_is_not_measured(rows: Path, base: Base, settings: Settings) -> None:
    publish_run(run(rows, base, settings), base=base, settings=settings)
    store = Store.open(settings.store_dir)
    options: dict[str, Any] = {"against": "base", "base": base, "store": store, "settings": settings}
    before = hashlib.sha256(rows.read_bytes()).hexdigest()
    with rows.open("a", encoding="utf-8") as file:
        file.write('{"prompt": "row 40", "completion": "ok ok"}\n')
    after = hashlib.sha256(rows.read_bytes()).hexdigest()
    with pytest.raises(DataError) as caught:
        reevaluate("tiny", **options)
    assert str(caught.value) == (
        f"{rows} is not the file that tiny@v1 was trained on: sha256 {before} then, {after} now. "
        "Put the old file back, or train again: rows it was trained on could be among the held-out ones."
    )
    store.close()


def test_a_version_split_in_another_way_than_now_is_measured_with_a_warning(
    rows: Path, base: Base, settings: Settings
) -> None:
    outcome = run(rows, base, settings)
    other = outcome.training.model_copy(update={"token_digest": "0" * 64})
    publish_run(replace(outcome, training=other), base=base, settings=settings)
    store = Store.open(settings.store_dir)
    (warning,) = reevaluate("tiny", against="base", base=base, store=store, settings=settings).warnings
    assert "The rows that tiny@v1 was trained on cannot be chosen again" in warning
    store.close()


def test_an_imported_version_needs_a_recipe_to_be_measured(
    tmp_path: Path, rows: Path, base: Base, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adapterhub.errors import UnknownTaskError

    store = Store.open(settings.store_dir)
    store.publish(write_adapter(tmp_path / "peft", base, method="lora"), task="foreign", base=base)
    with pytest.raises(UnknownTaskError, match="No recipe for task 'foreign'"):
        reevaluate("foreign", against="base", base=base, store=store, settings=settings)
    publish_run(run(rows, base, settings), base=base, settings=settings)
    monkeypatch.setattr("trainer.reevaluate.load_model", None)  # Nothing is generated.
    with pytest.raises(UnknownTaskError, match="No recipe for task 'foreign'"):
        reevaluate("tiny", against="foreign", base=base, store=store, settings=settings)
    store.close()
