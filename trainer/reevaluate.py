"""Measure a published version again, on its own held-out rows, against the base or another version."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from adapterhub.base import Base
from adapterhub.base.loading import load_model, load_tokenizer, use_threads
from adapterhub.errors import BaseMismatchError, DataError
from adapterhub.recipes import Recipe, load_recipe, parse_recipe
from adapterhub.settings import Settings
from adapterhub.store import Store, Version
from trainer.data import PreparedData, TokenRow
from trainer.data.split import normalise
from trainer.data.tokens import rows_digest
from trainer.evaluate import Comparison, base_answers, compare
from trainer.generate import Answers, generate_answers
from trainer.notices import library_notices_ignored
from trainer.run import base_cache, prepare_data

__all__ = ["Reevaluation", "reevaluate"]


@dataclass(frozen=True, slots=True)
class Reevaluation:
    """What was compared with what. warnings: why the rows may flatter one side."""

    first: str
    second: str
    comparison: Comparison
    max_new_tokens: int
    warnings: tuple[str, ...]


def reevaluate(
    ref: str,
    *,
    against: str,
    base: Base,
    store: Store,
    settings: Settings,
    num_rows: int | None = None,
    seed: int | None = None,
    on_rows: Callable[[str, int, int], None] | None = None,
) -> Reevaluation:
    """Compare version `ref` with `against`, which is "base" or another reference.

    num_rows: how many held-out rows, all by default; seed: draw them at random instead of taking the first ones.
    """
    use_threads(settings)
    version = store.get_version(ref)
    other = None if against == "base" else store.get_version(against)
    for each in (version, other):
        if each is not None and each.base_digest != base.digest:
            raise BaseMismatchError(
                f"{each.label} was trained on base {each.base_digest[:12]}, but {base.name!r} ({base.quantization}) "
                f"is {base.digest[:12]}.",
                "Choose its base with `--base` and `--quantization`.",
            )
    recipe = _recipe_of(version, store, settings)
    tokenizer = load_tokenizer(base)
    prepare = partial(_prepare_again, store=store, settings=settings, tokenizer=tokenizer)
    data, warnings = prepare(version)
    rows = _choose(data.held_out, num_rows, seed)
    if other is not None:
        theirs, doubts = prepare(other)
        warnings += [*doubts, *_overlap(theirs, rows, other.label)]
    options: dict[str, Any] = {"tokenizer": tokenizer}

    def report(name: str) -> Callable[[int, int], None] | None:
        return None if on_rows is None else partial(on_rows, name)

    def answers_of(each: Version) -> Answers:
        model = _open(each, store, base)
        prompts = [row.prompt_ids for row in rows]
        return generate_answers(model, prompts, generation=recipe.generation, on_rows=report(each.label), **options)

    if other is None:
        first = base_answers(
            lambda: _load(base),
            rows,
            base=base,
            recipe=recipe,
            cache_folder=base_cache(settings),
            device=_device(),
            on_rows=report("base"),
            **options,
        )
    else:
        first = answers_of(other)
    comparison = compare(first, answers_of(version), rows, recipe=recipe)
    if seed is not None:
        comparison = replace(comparison, record=comparison.record.model_copy(update={"seed": seed}))
    label = "base" if other is None else other.label
    return Reevaluation(label, version.label, comparison, recipe.generation.max_new_tokens, tuple(warnings))


def _recipe_of(version: Version, store: Store, settings: Settings) -> Recipe:
    """The recipe a version was trained with, so that held-out rows are those it has not seen; else the task's."""
    training = store.manifest(version).training
    if training is not None:
        return parse_recipe(training.recipe, where=f"recipe of {version.label}")
    return load_recipe(version.task, settings)


def _prepare_again(
    version: Version, *, store: Store, settings: Settings, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreparedData, list[str]]:
    """Return the rows of a version's recipe and doubts about them. Raises DataError when its data file has changed."""
    data = prepare_data(_recipe_of(version, store, settings), settings=settings, tokenizer=tokenizer)
    training = store.manifest(version).training
    if training is None:
        return data, [f"{version.label} was imported; nobody knows which rows it was trained on."]
    for name, recorded in training.data_digests.items():
        found = data.digests.get(name)
        if found != recorded:
            raise DataError(
                f"{data.report.file} is not the file that {version.label} was trained on: sha256 {recorded} then, "
                f"{found} now.",
                "Put the old file back, or train again: rows it was trained on could be among the held-out ones.",
            )
    if rows_digest(data.train) != training.token_digest:
        return data, [
            f"The rows that {version.label} was trained on cannot be chosen again, because the split or the tokenizer "
            "has changed since; it may have seen some of these rows."
        ]
    return data, []


def _overlap(theirs: PreparedData, rows: tuple[TokenRow, ...], label: str) -> list[str]:
    digests = {row.row_digest for row in theirs.train}
    prompts = {normalise(row.prompt_text) for row in theirs.train}
    count = sum(row.row_digest in digests or normalise(row.prompt_text) in prompts for row in rows)
    return [f"{label} was trained on {count} of these {len(rows)} rows."] if count else []


def _choose(rows: tuple[TokenRow, ...], num_rows: int | None, seed: int | None) -> tuple[TokenRow, ...]:
    wanted = len(rows) if num_rows is None else num_rows
    if not 2 <= wanted <= len(rows):
        raise DataError(
            f"--rows is {wanted}, but this version has {len(rows)} held-out rows.",
            f"Use 2 to {len(rows)}; a later training run can hold out more with `--set split.eval=N`.",
        )
    return rows[:wanted] if seed is None else tuple(random.Random(seed).sample(rows, wanted))


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _load(base: Base) -> Any:
    return load_model(base, device=_device())


def _open(version: Version, store: Store, base: Base) -> Any:
    from peft import PeftModel

    with library_notices_ignored():
        return PeftModel.from_pretrained(_load(base), store.view(version.serving_digest)).eval()
