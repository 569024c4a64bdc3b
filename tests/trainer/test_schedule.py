from __future__ import annotations

import pytest

from adapterhub.recipes import Training
from trainer.schedule import learning_rate_factor


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25]),
        ("cosine", [1 / 3, 2 / 3, 1, 0.8535533905932737, 0.5, 0.1464466094067262]),
    ],
)
def test_the_rate_rises_over_the_warm_up_falls_as_asked_and_is_never_zero(schedule: str, expected: list[float]) -> None:
    training = Training.model_validate({"max_steps": 6, "warmup": 0.3, "schedule": schedule})
    assert [learning_rate_factor(step, training) for step in range(6)] == pytest.approx(expected)


def test_a_run_of_one_step_without_warm_up_uses_the_full_rate() -> None:
    assert learning_rate_factor(0, Training(max_steps=1, warmup=0)) == 1
