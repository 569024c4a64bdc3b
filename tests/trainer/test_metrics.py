from __future__ import annotations

import math
from pathlib import Path

import pytest
from scipy import stats

from adapterhub.errors import DataError, QualityGateError
from adapterhub.recipes import DataSource, Gate, Recipe
from adapterhub.records import EvaluationRecord
from trainer.data.tokens import TokenRow
from trainer.evaluate import check_gate, compare
from trainer.generate import Answers
from trainer.metrics import build_scorer, find_label, find_number, mcnemar_p_value, paired_difference


def recipe(metric: str, labels: tuple[str, ...] = ()) -> Recipe:
    return Recipe.model_validate(
        {
            "task": "ask",
            "data": DataSource(file=Path("x")),
            "metric": metric,
            "labels": labels,
            "gate": Gate(num_rows=4),
        }
    )


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        # Longest common subsequence "police kill gunman": 3 words; precision 3/4, recall 3/3; F = 2pr/(p+r).
        ("the police kill gunman", "police kill gunman", 2 * 0.75 / 1.75),
        # Common subsequence "police" and "gunman": 2 of 3 and 2 of 4.
        ("police shot gunman", "police will kill gunman", 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)),
        # Words are stemmed and case is folded.
        ("Police killed gunmen", "police kills gunmen", 1.0),
        ("", "police", 0.0),
        ("nothing shared", "police", 0.0),
    ],
)
def test_rouge_l_equals_the_value_counted_by_hand(answer: str, reference: str, expected: float) -> None:
    assert build_scorer(recipe("rouge_l"))(answer, reference) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "labels", "expected"),
    [
        ("Yes, it is.", ("yes", "no"), "yes"),
        ("No. Yes would be wrong.", ("yes", "no"), "no"),
        ("nobody knows yesterday", ("yes", "no"), None),
        ("a bank: B", ("A", "B"), "B"),
        ("A. bank", ("A", "B"), "A"),
        ("", ("yes", "no"), None),
        ("A person would go to C", ("A", "B", "C"), "C"),
        ("A person would go there", ("A", "B", "C"), None),
        ("I think B", ("B", "I"), "B"),
        ("A", ("A", "B"), "A"),
        ("(B)", ("A", "B"), "B"),
        ("**B** is right, not A", ("A", "B"), "B"),
        ("A is right", ("A", "B"), "A"),
        ("Between A and B, the answer is B.", ("A", "B"), "B"),
        ("Not A. The Answer: (C)", ("A", "B", "C"), "C"),
        ("B) bank, because A is wet", ("A", "B"), "B"),
        ("C\nA bank is dry", ("A", "B", "C"), "C"),
        ("ABBA", ("A", "B"), None),
        ("new york city", ("new york", "new york city"), "new york city"),
    ],
)
def test_the_first_label_in_the_answer_counts(text: str, labels: tuple[str, ...], expected: str | None) -> None:
    assert find_label(text, labels) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("9 apples", 9.0),
        ("3 + 4 = 7", 7.0),
        ("1,250.5 miles", 1250.5),
        ("-3", -3.0),
        ("none", None),
        ("costs $5.", 5.0),
    ],
)
def test_the_last_number_of_the_answer_counts(text: str, expected: float | None) -> None:
    assert find_number(text) == expected


def test_accuracy_and_number_score_one_only_for_equal_answers() -> None:
    accuracy = build_scorer(recipe("accuracy", ("yes", "no")))
    assert [accuracy(a, "yes") for a in ("Yes!", "no", "perhaps")] == [1.0, 0.0, 0.0]
    number = build_scorer(recipe("number"))
    assert [number(a, "9 apples") for a in ("9.0", "it is 9", "8", "nine")] == [1.0, 1.0, 0.0, 0.0]


def test_the_interval_equals_the_textbook_formula() -> None:
    first, second = [0.1, 0.4, 0.3, 0.9, 0.2], [0.3, 0.3, 0.7, 0.9, 0.6]
    d = [0.2, -0.1, 0.4, 0.0, 0.4]
    mean = sum(d) / 5
    deviation = math.sqrt(sum((x - mean) ** 2 for x in d) / 4)
    half = 2.7764451051977987 * deviation / math.sqrt(5)  # t(0.975, 4) from a table.
    result = paired_difference(first, second, confidence=0.95)
    assert (result.mean, result.low, result.high) == pytest.approx((mean, mean - half, mean + half))
    reference = stats.ttest_rel(second, first).confidence_interval(0.95)
    assert (result.low, result.high) == pytest.approx((reference.low, reference.high))


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = stats.norm(loc=0.05, scale=0.2)
    draws = generator.rvs(size=(400, 96), random_state=0)
    hits = 0
    for d in draws:
        result = paired_difference([0.0] * 96, d.tolist(), confidence=0.95)
        hits += result.low <= 0.05 <= result.high
    assert 0.92 <= hits / 400 <= 0.98


def test_an_interval_needs_two_rows_and_equal_lengths() -> None:
    with pytest.raises(ValueError, match="needs two rows, got 1"):
        paired_difference([1.0], [2.0], confidence=0.95)
    with pytest.raises(ValueError, match="zip"):
        paired_difference([1.0], [2.0, 3.0], confidence=0.95)


def test_compare_scores_both_sides_on_the_same_rows() -> None:
    rows = [TokenRow(i, (), target, None, (1,), (2,)) for i, target in enumerate(("yes", "no", "no", "yes"))]
    first, second = Answers(("yes", "yes", "", "no"), 1), Answers(("yes", "no", "no", "no"), 2)
    result = compare(first, second, rows, recipe=recipe("accuracy", ("yes", "no")))
    assert (result.record.num_base_unfinished, result.record.num_adapter_unfinished) == (1, 2)
    assert (result.record.base_score, result.record.adapter_score, result.record.difference) == (0.25, 0.75, 0.5)
    assert result.second_scores == (1.0, 1.0, 1.0, 0.0)


def record(low: float, mean: float, high: float) -> EvaluationRecord:
    return EvaluationRecord(
        metric="rouge_l",
        num_rows=96,
        base_score=0.1,
        adapter_score=0.1 + mean,
        difference=mean,
        interval_low=low,
        interval_high=high,
        confidence=0.95,
        seed=0,
        data_digest="0",
    )


def test_the_gate_passes_only_when_the_whole_interval_lies_above_the_demand() -> None:
    check_gate(record(0.001, 0.05, 0.1), recipe("rouge_l"), kept_in=Path("/kept"))
    with pytest.raises(QualityGateError) as caught:
        check_gate(record(-0.001, 0.05, 0.101), recipe("rouge_l"), kept_in=Path("/kept"))
    assert str(caught.value) == (
        "'ask' was not published: rouge_l changed by +0.0500 against the base, 95% interval [-0.0010, +0.1010] on 96 "
        "held-out rows; the gate wants its lower end above +0.0000. The adapter is kept in /kept. Train longer "
        "(`--max-steps`), on more rows, or measure on more rows (`--set gate.num_rows=N`)."
    )
    assert caught.value.exit_code == 1
    with pytest.raises(QualityGateError):
        check_gate(record(0.0, 0.0, 0.0), recipe("rouge_l"), kept_in=Path("/kept"))


def test_the_gate_never_passes_on_few_rows_even_when_all_agree() -> None:
    certain = record(1.0, 1.0, 1.0)
    check_gate(certain.model_copy(update={"num_rows": 20}), recipe("rouge_l"), kept_in=Path("/kept"))
    with pytest.raises(DataError) as caught:
        check_gate(certain.model_copy(update={"num_rows": 19}), recipe("rouge_l"), kept_in=Path("/kept"))
    assert str(caught.value) == (
        "'ask' measures on 19 held-out rows, but publishing needs 20. Hold out more (`--set split.eval=20`, and "
        "gate.num_rows at least that), add rows, or use `--no-publish`."
    )


def test_the_exact_test_of_right_and_wrong_answers_equals_the_binomial_sum() -> None:
    first, second = [0.0] * 5 + [1.0] * 20, [1.0] * 25
    assert mcnemar_p_value(first, second) == pytest.approx(2 / 2**5)
    assert mcnemar_p_value(second, first) == pytest.approx(2 / 2**5)
    assert mcnemar_p_value([0, 0, 0, 0, 1], [1, 1, 1, 1, 0]) == pytest.approx(2 * (1 + 5) / 2**5)
    assert mcnemar_p_value(second, second) == 1.0


def test_the_gate_wants_the_exact_test_where_few_right_answers_make_the_interval_too_narrow() -> None:
    rows = [TokenRow(i, (), "yes", None, (1,), (2,)) for i in range(96)]
    few = ("no",) * 5 + ("yes",) * 91  # The t interval of 5 wins and no loss lies above 0; a fair coin does it in 6 %.
    labelled = recipe("accuracy", ("yes", "no"))
    result = compare(Answers(few), Answers(("yes",) * 96), rows, recipe=labelled).record
    assert result.interval_low > 0
    with pytest.raises(QualityGateError, match=r"above \+0\.0000, and McNemar's p of 0\.0625 below 0\.0500\. The"):
        check_gate(result, labelled, kept_in=Path("/kept"))
    lenient = labelled.model_copy(update={"gate": Gate(min_gain=-0.01)})
    check_gate(result, lenient, kept_in=Path("/kept"))
    more = compare(Answers(("no", *few[:-1])), Answers(("yes",) * 96), rows, recipe=labelled).record
    check_gate(more, labelled, kept_in=Path("/kept"))
