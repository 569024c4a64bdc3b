"""Draws follow temperature, top_p and seed, and never depend on the rest of the batch."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from server.engine.detokenize import TokenTexts
from server.engine.sampling import Draw, Sampler, draw_tokens
from server.engine.types import SamplingParams
from tests.support.tiny_models import byte_tokenizer

NUM_DRAWS = 2000


def _draw(**options) -> Draw:
    return Draw(SamplingParams(max_tokens=1, **options))


def _frequencies(logits: torch.Tensor, **options) -> torch.Tensor:
    draw = _draw(seed="0", **options)
    tokens = [draw_tokens(logits[None], [draw])[0] for _ in range(NUM_DRAWS)]
    return torch.bincount(torch.tensor(tokens), minlength=len(logits)) / NUM_DRAWS


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def test_temperature_zero_takes_the_best_token() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])
    assert draw_tokens(logits, [_draw(), _draw()]) == [1, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_match_the_softmax(temperature: float) -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    expected = torch.softmax(logits / temperature, dim=-1)
    assert torch.allclose(_frequencies(logits, temperature=temperature), expected, atol=0.04)


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = torch.log(torch.tensor([0.1, 0.5, 0.3, 0.1]))
    frequencies = _frequencies(logits, temperature=1.0, top_p=0.75)
    assert torch.allclose(frequencies, torch.tensor([0.0, 0.625, 0.375, 0.0]), atol=0.04)
    assert _frequencies(logits, temperature=1.0, top_p=1e-6)[1] == 1


def test_top_p_is_exact_when_very_many_tokens_share_the_mass() -> None:
    logits = torch.zeros(5000)
    draw = _draw(seed="0", temperature=1.0, top_p=0.9)
    tokens = {draw_tokens(logits[None], [draw])[0] for _ in range(3000)}
    assert len(tokens) > 2000


def test_a_tiny_temperature_is_greedy_and_finite() -> None:
    assert _frequencies(torch.tensor([1e4, 1e4 + 1, -1e4]), temperature=1e-4)[1] == 1


def test_a_seed_repeats_its_draws_whatever_else_is_in_the_batch() -> None:
    torch.manual_seed(0)
    logits = torch.randn(20, 50)
    options = {"seed": 7, "temperature": 1.0, "top_p": 0.9}
    alone = _draw(**options)
    expected = [draw_tokens(row[None], [alone])[0] for row in logits]
    among, other = _draw(**options), _draw(temperature=1.5)
    got = [draw_tokens(torch.stack([row * 2, row, row]), [other, among, other])[1] for row in logits]
    assert got == expected
    another = _draw(**options | {"seed": 8})
    assert [draw_tokens(row[None], [another])[0] for row in logits] != expected
    free = [_draw(temperature=1.0) for _ in range(2)]
    assert len({tuple(draw_tokens(row[None], [draw])[0] for row in logits) for draw in free}) == 2


def test_log_probabilities_are_those_of_the_plain_softmax(tokenizer: PreTrainedTokenizerFast) -> None:
    logits = torch.zeros(1, 259)
    logits[0, 65] = 3.0
    draw = _draw(logprobs=2)
    result = Sampler(TokenTexts(tokenizer)).sample(logits, [draw])[0]
    assert result is not None
    token_id, logprob = result
    assert token_id == 65
    assert logprob is not None
    assert logprob.chosen == logprob.top[0]
    assert logprob.chosen.logprob == pytest.approx(3 - math.log(math.exp(3) + 258), abs=1e-5)
    assert logprob.chosen.raw == tokenizer.decode([65]).encode()
    assert len(logprob.top) == 2
    bare = Sampler(TokenTexts(tokenizer)).sample(logits, [_draw()])[0]
    assert bare == (65, None)


def test_a_row_that_is_not_finite_fails_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    logits = torch.zeros(3, 259)
    logits[0, 3] = math.nan
    logits[2, 4] = math.inf
    logits[1, 5] = 1.0
    draws = [_draw(temperature=1.0, logprobs=1), _draw(), _draw()]
    results = Sampler(TokenTexts(tokenizer)).sample(logits, draws)
    assert results[0] is None
    assert results[1] == (5, None)
    assert results[2] is None
