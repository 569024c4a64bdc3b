"""Penalties are the formulas of CTRL and of OpenAI's reference, over the right tokens."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from server.engine.penalties import Penalties, apply_penalties_
from server.engine.sampling import Draw, draw_tokens
from server.engine.types import SamplingParams

V = 12
tokens = st.lists(st.integers(0, V - 1), max_size=12)
factors = st.sampled_from([0.5, 1.0, 1.2, 3.0])
offsets = st.sampled_from([-2.0, -0.3, 0.0, 0.7, 2.0])


@st.composite
def cases(draw) -> tuple[SamplingParams, list[int], list[int], list[float]]:
    params = SamplingParams(
        max_tokens=1,
        repetition_penalty=draw(factors),
        presence_penalty=draw(offsets),
        frequency_penalty=draw(offsets),
    )
    return params, draw(tokens), draw(tokens), draw(st.lists(st.floats(-20, 20, width=32), min_size=V, max_size=V))


def _expected(params: SamplingParams, prompt: list[int], answer: list[int], logits: list[float]) -> list[float]:
    """The formulas, token by token."""
    result = []
    for token, value in enumerate(logits):
        if token in prompt or token in answer:
            value = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        count = answer.count(token)
        result.append(value - params.presence_penalty * (count > 0) - params.frequency_penalty * count)
    return result


@given(st.lists(cases(), min_size=1, max_size=4))
def test_every_logit_follows_the_formula_whatever_the_other_rows_are(batch) -> None:
    penalties = []
    for params, prompt, answer, _ in batch:
        one = Penalties(params, prompt)
        for token_id in answer:
            one.count(token_id)
        penalties.append(one)
    logits = torch.tensor([values for *_, values in batch])
    apply_penalties_(logits, penalties)
    expected = torch.tensor([_expected(*case) for case in batch], dtype=torch.float64)
    assert torch.allclose(logits.double(), expected, rtol=1e-6, atol=1e-5)


def test_presence_and_frequency_leave_the_prompt_alone_and_repetition_does_not() -> None:
    logits = torch.tensor([[1.0, 0.9, 0.0]])
    for option, best in (("presence_penalty", 0), ("frequency_penalty", 0), ("repetition_penalty", 1)):
        draw = Draw(SamplingParams(max_tokens=1, **{option: 1.5}), prompt_token_ids=[0])
        assert draw_tokens(logits.clone(), [draw]) == [best]


def test_frequency_grows_with_every_occurrence_and_presence_does_not() -> None:
    def after(num_times: int, option: str) -> int:
        draw = Draw(SamplingParams(max_tokens=1, **{option: 0.4}))
        for _ in range(num_times):
            draw.accept(0)
        (token,) = draw_tokens(torch.tensor([[1.0, 0.5]]), [draw])
        assert isinstance(token, int)
        return token

    assert [after(num_times, "frequency_penalty") for num_times in range(4)] == [0, 0, 1, 1]
    assert [after(num_times, "presence_penalty") for num_times in range(4)] == [0, 0, 0, 0]
