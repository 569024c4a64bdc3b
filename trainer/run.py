"""One training run from recipe to published version: check, train, measure, gate, publish.

Each stage is one call; what people see of it is the business of a RunView.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from adapterhub.base import Base
from adapterhub.base.loading import load_model, load_tokenizer, use_threads
from adapterhub.errors import RecipeError, SettingsError
from adapterhub.recipes import Recipe
from adapterhub.records import EvaluationRecord, TrainingRecord
from adapterhub.settings import Settings
from adapterhub.store import Store, Version
from trainer.data import DataReport, PreparedData, TokenRow, data_file, prepare
from trainer.evaluate import Comparison, base_answers, check_gate, check_num_rows, compare
from trainer.generate import generate_answers
from trainer.lineage import training_record
from trainer.loop import TrainingResult, train
from trainer.methods import build_peft_config
from trainer.progress import StepReport

__all__ = ["RunOutcome", "RunView", "base_cache", "prepare_data", "publish_run", "run_recipe", "save_adapter"]

_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


class RunView:
    """What a run tells whoever watches; this one is silent. A subclass shows it."""

    def data(self, report: DataReport) -> None:
        """The rows are checked; no model is loaded yet."""

    def loading(self, base: Base) -> AbstractContextManager[Any]:  # noqa: ARG002
        """Open while the base loads."""
        return nullcontext()

    def training(self) -> AbstractContextManager[Callable[[StepReport], None] | None]:
        """Open while training; gives what is called after each step."""
        return nullcontext()

    def evaluating(self) -> AbstractContextManager[Callable[[str, int, int], None] | None]:
        """Open while measuring; gives what is called with (model, rows done, rows in all)."""
        return nullcontext()

    def trained(self, result: TrainingResult) -> None:
        """Training ended and every trainable tensor moved."""

    def evaluated(self, record: EvaluationRecord, recipe: Recipe) -> None:
        """Base and adapter are measured; the gate has not decided yet."""


@dataclass(frozen=True, slots=True)
class RunOutcome:
    """A finished run: the adapter and the evidence, not published yet."""

    recipe: Recipe
    folder: Path
    adapter: Path
    training: TrainingRecord
    evaluation: EvaluationRecord


def base_cache(settings: Settings) -> Path:
    """Folder of the answers bases gave to held-out rows."""
    return settings.runs_dir / "base-answers"


def prepare_data(recipe: Recipe, *, settings: Settings, tokenizer: PreTrainedTokenizerBase) -> PreparedData:
    """Fetch, check, tokenize and split the rows of a recipe."""
    return prepare(data_file(recipe.data, settings), recipe, tokenizer)


def run_recipe(
    recipe: Recipe,
    *,
    base: Base,
    settings: Settings,
    keep_quantized: bool | None = None,
    will_publish: bool = False,
    view: RunView | None = None,
) -> RunOutcome:
    """Check the data, train, and measure on held-out rows; see `publish_run` for the rest.

    recipe: resolved and filled in. keep_quantized: see `adapterhub.base.loading.load_model`. will_publish: refuse
    before training what `publish_run` would refuse for its rows or its store.
    """
    import torch

    view = view or RunView()
    use_threads(settings)
    _check_fits(recipe, base)
    if will_publish:
        Store.open(settings.store_dir).close()
    tokenizer = load_tokenizer(base)
    data = prepare_data(recipe, settings=settings, tokenizer=tokenizer)
    view.data(data.report)
    rows = data.held_out[: recipe.gate.num_rows]
    if will_publish:
        check_num_rows(len(rows), recipe)
    folder = _new_run_folder(recipe, settings)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with view.loading(base):
        model = load_model(base, device=device, keep_quantized=keep_quantized)
    with view.training() as on_step:
        result = train(
            model, data.train, recipe=recipe, base=base, tokenizer=tokenizer, run_folder=folder, on_step=on_step
        )
    adapter = save_adapter(result.model, folder / "adapter", base=base)
    view.trained(result)
    training = training_record(recipe, data, data.train, result)
    _write_json(folder / "run.json", {"base": base.record(), "training": training, "data": asdict(data.report)})
    asked = {"base": base, "tokenizer": tokenizer, "device": device, "keep_quantized": keep_quantized}
    comparison = _measure(result.model, rows, recipe, asked=asked, settings=settings, view=view)
    _write_json(folder / "evaluation.json", {"record": comparison.record, "rows": _answer_rows(comparison, rows)})
    view.evaluated(comparison.record, recipe)
    return RunOutcome(recipe, folder, adapter, training, comparison.record)


def publish_run(outcome: RunOutcome, *, base: Base, settings: Settings) -> Version:
    """Publish the adapter of a run as a new version. Raises QualityGateError when it gains too little over the base."""
    check_gate(outcome.evaluation, outcome.recipe, kept_in=outcome.adapter)
    store = Store.open(settings.store_dir)
    try:
        return store.publish(
            outcome.adapter,
            task=outcome.recipe.task,
            base=base,
            training=outcome.training,
            evaluation=outcome.evaluation,
            actor="hub train",
        )
    finally:
        store.close()


def _check_fits(recipe: Recipe, base: Base) -> None:
    """Raise RecipeError for what this base cannot do, before anything of it is loaded."""
    build_peft_config(recipe, base)
    if recipe.training.max_length > base.context_tokens:
        raise RecipeError(
            f"training.max_length is {recipe.training.max_length}, but base {base.name!r} reads "
            f"{base.context_tokens} tokens.",
            f"Use `--set training.max_length={base.context_tokens}` or less.",
        )


def _new_run_folder(recipe: Recipe, settings: Settings) -> Path:
    name = f"{recipe.task}-{recipe.method}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    folder = settings.runs_dir / name
    attempt = 1
    while folder.exists():
        attempt += 1
        folder = settings.runs_dir / f"{name}-{attempt}"
    try:
        folder.mkdir(parents=True)
    except OSError as exc:
        raise SettingsError(
            f"The run folder {str(folder)!r} cannot be made: {exc.strerror}.",
            "Set ADAPTERHUB_HOME to a writable folder.",
        ) from exc
    return folder


def save_adapter(model: Any, folder: Path, *, base: Base) -> Path:
    """Write the PEFT folder and the digest of its base; nothing else, no pickle, no embeddings."""
    for config in model.peft_config.values():
        config.base_model_name_or_path = base.name  # A folder of this machine would mean nothing elsewhere.
    model.save_pretrained(folder, save_embedding_layers=False)
    for path in folder.iterdir():
        if path.name not in _ADAPTER_FILES:
            path.unlink()
    _write_json(folder / "adapterhub.json", {"base_digest": base.digest})
    shutil.rmtree(folder.parent / "trainer", ignore_errors=True)
    return folder


def _measure(
    model: Any,
    rows: tuple[TokenRow, ...],
    recipe: Recipe,
    *,
    asked: dict[str, Any],
    settings: Settings,
    view: RunView,
) -> Comparison:
    """asked: how the base is asked, see `base_answers`."""
    with view.evaluating() as on_rows:

        def report(name: str) -> Callable[[int, int], None] | None:
            return None if on_rows is None else partial(on_rows, name)

        first = base_answers(
            lambda: model,
            rows,
            recipe=recipe,
            cache_folder=base_cache(settings),
            on_rows=report("base"),
            **asked,
        )
        second = generate_answers(
            model,
            [row.prompt_ids for row in rows],
            tokenizer=asked["tokenizer"],
            generation=recipe.generation,
            on_rows=report("adapter"),
        )
    return compare(first, second, rows, recipe=recipe)


def _answer_rows(comparison: Comparison, rows: tuple[TokenRow, ...]) -> list[dict[str, Any]]:
    parts = (comparison.first_answers, comparison.second_answers, comparison.first_scores, comparison.second_scores)
    return [
        {
            "line": row.line,
            "reference": row.target,
            "base": first,
            "adapter": second,
            "base_score": first_score,
            "adapter_score": second_score,
        }
        for row, first, second, first_score, second_score in zip(rows, *parts, strict=True)
    ]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    def plain(value: Any) -> Any:
        return value.model_dump(mode="json") if hasattr(value, "model_dump") else str(value)

    path.write_text(json.dumps(content, default=plain, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
