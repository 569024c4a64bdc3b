"""Measure an adapter against the base, or another adapter, on the same held-out rows.

The base's answers are kept on disk under everything they depend on, so each base is asked once per held-out set.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from adapterhub.base import Base
from adapterhub.base.prompts import stop_token_ids
from adapterhub.errors import DataError, QualityGateError
from adapterhub.recipes import Recipe
from adapterhub.records import EvaluationRecord
from trainer.data.files import written_whole
from trainer.data.tokens import TokenRow, rows_digest
from trainer.generate import Answers, generate_answers
from trainer.metrics import build_scorer, mcnemar_p_value, paired_difference

__all__ = ["Comparison", "base_answers", "check_gate", "check_num_rows", "compare"]

# From 20 rows on, Student's t is within 7 % of the normal quantile; below, a few lucky rows decide.
_MIN_GATE_ROWS = 20
_CACHE_FORMAT = 2  # Raise it when prompts or decoding change, so that old answers are not reused.


@dataclass(frozen=True, slots=True)
class Comparison:
    """The record of an evaluation and the answers behind it, one per row."""

    record: EvaluationRecord
    first_answers: tuple[str, ...]
    second_answers: tuple[str, ...]
    first_scores: tuple[float, ...]
    second_scores: tuple[float, ...]


def compare(first: Answers, second: Answers, rows: Sequence[TokenRow], *, recipe: Recipe) -> Comparison:
    """Score two sets of answers to the same rows; `first` is the base or the older adapter."""
    score = build_scorer(recipe)
    first_scores = tuple(score(answer, row.target) for answer, row in zip(first.texts, rows, strict=True))
    second_scores = tuple(score(answer, row.target) for answer, row in zip(second.texts, rows, strict=True))
    difference = paired_difference(first_scores, second_scores, confidence=recipe.gate.confidence)
    record = EvaluationRecord(
        metric=recipe.metric,
        num_rows=len(rows),
        base_score=sum(first_scores) / len(rows),
        adapter_score=sum(second_scores) / len(rows),
        difference=difference.mean,
        interval_low=difference.low,
        interval_high=difference.high,
        confidence=recipe.gate.confidence,
        p_value=None if recipe.metric == "rouge_l" else mcnemar_p_value(first_scores, second_scores),
        num_base_unfinished=first.num_unfinished,
        num_adapter_unfinished=second.num_unfinished,
        seed=recipe.split.seed,
        data_digest=rows_digest(rows),
    )
    return Comparison(record, first.texts, second.texts, first_scores, second_scores)


def base_answers(
    load: Callable[[], Any],
    rows: Sequence[TokenRow],
    *,
    base: Base,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    cache_folder: Path,
    device: str,
    keep_quantized: bool | None = None,
    on_rows: Callable[[int, int], None] | None = None,
) -> Answers:
    """Return the base's answers, from disk when this base has already answered these rows with these settings.

    load: gives the base, or a PeftModel, whose adapter is switched off meanwhile; called only when needed.
    device, keep_quantized: how `load` loads the base; they change the last bits of logits.
    """
    key = {
        "format": _CACHE_FORMAT,
        "base": base.digest,
        "prompts": [row.prompt_ids for row in rows],
        "generation": recipe.generation.model_dump(mode="json"),
        "stops": sorted(stop_token_ids(tokenizer)),
        "device": device,
        "keep_quantized": keep_quantized,
        "packages": {name: metadata.version(name) for name in ("bitsandbytes", "torch", "transformers")},
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    path = cache_folder / f"{name}.json"
    known = _find_answers(path, len(rows))
    if known is not None:
        if on_rows is not None:
            on_rows(len(rows), len(rows))
        return known
    prompts = [row.prompt_ids for row in rows]
    model = load()
    options: dict[str, Any] = {"tokenizer": tokenizer, "generation": recipe.generation, "on_rows": on_rows}
    if hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            answers = generate_answers(model, prompts, **options)
    else:
        answers = generate_answers(model, prompts, **options)
    with written_whole(path) as scratch:
        scratch.write_text(json.dumps(asdict(answers), ensure_ascii=False), encoding="utf-8")
    return answers


def _find_answers(path: Path, num_rows: int) -> Answers | None:
    """Read answers from disk; a file that is missing, damaged or of another length counts as none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        answers = Answers(tuple(str(text) for text in content["texts"]), int(content["num_unfinished"]))
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return answers if len(answers.texts) == num_rows else None


def check_num_rows(num_rows: int, recipe: Recipe) -> None:
    """Raise DataError when an adapter measured on `num_rows` rows could not be published."""
    if num_rows < _MIN_GATE_ROWS:
        raise DataError(
            f"{recipe.task!r} measures on {num_rows} held-out rows, but publishing needs {_MIN_GATE_ROWS}.",
            f"Hold out more (`--set split.eval={_MIN_GATE_ROWS}`, and gate.num_rows at least that), add rows, or use "
            "`--no-publish`.",
        )


def check_gate(record: EvaluationRecord, recipe: Recipe, *, kept_in: Path) -> None:
    """Raise QualityGateError unless the lower end of the interval lies above the gain the recipe demands.

    Scores of 0 and 1 must pass the exact McNemar test as well, unless the recipe allows a loss. Raises DataError when
    there are too few rows for either.
    """
    check_num_rows(record.num_rows, recipe)
    level = 1 - record.confidence
    is_exact = record.p_value is None or recipe.gate.min_gain < 0 or record.p_value < level
    if record.interval_low > recipe.gate.min_gain and is_exact:
        return
    doubt = "" if is_exact else f", and McNemar's p of {record.p_value:.4f} below {level:.4f}"
    raise QualityGateError(
        f"{recipe.task!r} was not published: {record.metric} changed by {record.difference:+.4f} against the base, "
        f"{record.confidence:.0%} interval [{record.interval_low:+.4f}, {record.interval_high:+.4f}] on "
        f"{record.num_rows} held-out rows; the gate wants its lower end above {recipe.gate.min_gain:+.4f}{doubt}.",
        f"The adapter is kept in {kept_in}. Train longer (`--max-steps`), on more rows, or measure on more rows "
        "(`--set gate.num_rows=N`).",
    )
