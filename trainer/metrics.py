"""Score answers against references, row by row, and say how sure a paired difference is.

Knows text and numbers; no tokens, no tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, assert_never

from adapterhub.recipes import Recipe

__all__ = ["PairedDifference", "build_scorer", "find_label", "find_number", "mcnemar_p_value", "paired_difference"]

_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Mean of (second minus first) over rows with its t interval."""

    mean: float
    low: float
    high: float
    num_rows: int


def build_scorer(recipe: Recipe) -> Callable[[str, str], float]:
    """Return score(answer, reference) in [0, 1] for the metric of the recipe."""
    match recipe.metric:
        case "rouge_l":
            return _rouge_l
        case "accuracy":
            labels = recipe.labels
            return lambda answer, reference: _equal(find_label(answer, labels), find_label(reference, labels))
        case "number":
            return lambda answer, reference: _equal(find_number(answer), find_number(reference))
    assert_never(recipe.metric)


def _equal(found: object, expected: object) -> float:
    return float(found is not None and found == expected)


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)


def _rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L F1 (Lin 2004, https://aclanthology.org/W04-1013) on stemmed words."""
    return float(_rouge().score(reference, answer)["rougeL"].fmeasure)


def find_label(text: str, labels: Sequence[str]) -> str | None:
    """Return the label that text answers with: the first one as a whole word, whatever its case; None without any.

    Labels of one letter must match in case, or the article "a" would be an answer. Among such, "answer is X" comes
    before an X at the start ("X.", "X)", "X" alone), and that before any other X.
    """
    if labels and all(len(label) == 1 for label in labels):
        return _find_letter(text, labels)
    hits: list[tuple[int, int, str]] = []
    for label in labels:
        match = re.search(rf"(?<!\w){re.escape(label)}(?!\w)", text, 0 if len(label) == 1 else re.IGNORECASE)
        if match:
            hits.append((match.start(), -len(label), label))
    return min(hits)[2] if hits else None


def _find_letter(text: str, labels: Sequence[str]) -> str | None:
    # "A person ..." and "I think ..." start with English words, not with answers; "A is right" does.
    letter = rf"(?P<label>{'|'.join(map(re.escape, labels))})(?!\w)(?!(?<=[AaI]) +(?!is\b)[a-z])"
    for pattern in (
        rf"(?i:\banswer(?: is|:)(?: option)?)[\s\"'(*]*{letter}",
        rf"\A[\s\"'(*]*{letter}(?=[\"'*]*(?:[.):,]|\s*\Z))",
        rf"(?<!\w){letter}",
    ):
        match = re.search(pattern, text)
        if match:
            return match["label"]
    return None


def find_number(text: str) -> float | None:
    """Return the last number of text, where chains of thought put the result; None when there is none."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def paired_difference(first: Sequence[float], second: Sequence[float], *, confidence: float) -> PairedDifference:
    """Return mean(second - first) and its two-sided Student t interval: mean -+ t(n - 1) * s / sqrt(n).

    The rows are a random sample of the held-out rows, so the interval speaks about rows like these. With differences
    that are all equal the interval has no width.
    """
    from scipy.stats import t

    differences = [b - a for a, b in zip(first, second, strict=True)]
    count = len(differences)
    if count < 2:
        raise ValueError(f"a paired interval needs two rows, got {count}")
    mean = math.fsum(differences) / count
    variance = math.fsum((d - mean) ** 2 for d in differences) / (count - 1)
    half = float(t.ppf(0.5 + confidence / 2, count - 1)) * math.sqrt(variance / count)
    # Scores of 0 and 1 that differ in few rows make it too narrow; `mcnemar_p_value` guards those.
    return PairedDifference(mean=mean, low=mean - half, high=mean + half, num_rows=count)


def mcnemar_p_value(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the two-sided p of "neither side is right more often", for scores of 0 and 1.

    Of the rows that only one side got right, each side has half by chance: an exact binomial test
    (McNemar 1947, https://doi.org/10.1007/BF02295996). 1 when no row differs.
    """
    from scipy.stats import binomtest

    num_better = sum(b > a for a, b in zip(first, second, strict=True))
    num_worse = sum(b < a for a, b in zip(first, second, strict=True))
    return float(binomtest(num_better, num_better + num_worse).pvalue) if num_better + num_worse else 1.0
