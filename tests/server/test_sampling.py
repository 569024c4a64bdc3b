"""Draws follow temperature, top_k, top_p, min_p and seed, and never depend on the rest of the batch."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from scipy.stats import chisquare
from transformers import PreTrainedTokenizerFast

from adapterhub.errors import AdapterHubError
from server.engine.detokenize import TokenTexts
from server.engine.sampling import Draw, Sampled, Sampler, draw_tokens
from server.engine.types import SamplingParams
from tests.support.tiny_models import byte_tokenizer

NUM_DRAWS = 2000
# A fixed seed makes the test repeat itself; a right sampler stays above this for all but one seed in ten thousand.
LEAST_P_VALUE = 1e-4
CUTS = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"top_k": 1},
    {"top_k": 3},
    {"top_k": 1000},
    {"top_p": 0.75},
    {"top_p": 1e-6},
    {"min_p": 0.3},
    {"min_p": 1.0},
    {"top_k": 4, "top_p": 0.7},
    {"top_p": 0.95, "min_p": 0.2},
    {"temperature": 1.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1},
]


def _draw(**options) -> Draw:
    return Draw(SamplingParams(max_tokens=1, **options))


def _drawn(logits: torch.Tensor, num_draws: int, **options) -> Counter[int]:
    draw, counts = _draw(seed="0", **{"temperature": 1.0} | options), Counter()
    for _ in range(num_draws):
        (token,) = draw_tokens(logits[None].clone(), [draw])
        draw.accept(token)
        counts[token] += 1
    return counts


def _distribution(
    logits: list[float], temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> dict[int, float]:
    """The definition, in float64: what each token's probability is."""
    weights = {token: math.exp(value / temperature) for token, value in enumerate(logits)}
    best_first = sorted(weights, key=lambda token: -weights[token])[: top_k or None]
    total, reached, kept = sum(weights[token] for token in best_first), 0.0, []
    for token in best_first:
        if reached < top_p:
            kept.append(token)
        reached += weights[token] / total
    kept = [token for token in kept if weights[token] >= min_p * weights[kept[0]]]
    return {token: weights[token] / sum(weights[one] for one in kept) for token in kept}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def test_temperature_zero_takes_the_best_token() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])
    assert draw_tokens(logits, [_draw(), _draw()]) == [1, 0]


@pytest.mark.parametrize("options", CUTS, ids=str)
def test_frequencies_match_the_definition(options: dict) -> None:
    logits = [0.1, 2.0, 1.3, -1.0, 0.9, -0.4, 1.1, -3.0]
    expected = _distribution(logits, **options)
    counts = _drawn(torch.tensor(logits), NUM_DRAWS, **options)
    assert set(counts) <= set(expected)
    if len(expected) > 1:
        observed = [counts[token] for token in expected]
        assert chisquare(observed, [NUM_DRAWS * p for p in expected.values()]).pvalue > LEAST_P_VALUE


@pytest.mark.parametrize("options", [{"top_p": 0.9}, {"top_k": 4500}], ids=str)
def test_a_cut_is_exact_when_very_many_tokens_are_left(options: dict) -> None:
    counts = _drawn(torch.linspace(1e-3, 0, 5000), 1500, **options)
    assert len(counts) > 1000
    assert 4400 < max(counts) < 4510


def test_a_tiny_temperature_is_greedy_and_finite() -> None:
    for temperature in (1e-4, 1e-300):
        assert set(_drawn(torch.tensor([1e4, 1e4 + 1, -1e4]), 20, temperature=temperature)) == {1}


def test_a_top_k_beyond_every_number_is_no_cut() -> None:
    assert set(_drawn(torch.zeros(3), 200, top_k=10**30)) == {0, 1, 2}


def _mixed_draws() -> list[Draw]:
    options = [{}, {"repetition_penalty": 1.3, "frequency_penalty": 0.5}, {"logprobs": 4}]
    options += [{"temperature": 1.0, **cut} for cut in CUTS]
    options += [{"temperature": 0.8, "presence_penalty": 1.0, "top_p": 0.99, "logprobs": 2}]
    draws = [
        Draw(SamplingParams(max_tokens=1, **{"seed": f"{idx}"} | one), prompt_token_ids=range(idx, idx + 40))
        for idx, one in enumerate(options)
    ]
    for draw in draws:
        draw.accept(7)
    return draws


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("scale", [0.1, 4.0])
def test_a_row_is_the_same_bits_alone_and_anywhere_in_a_batch(num_threads: int, scale: float) -> None:
    class WideTexts(TokenTexts):
        num_tokens = 20011

        def __init__(self) -> None:
            return

        def raw(self, token_id: int) -> bytes:
            return str(token_id).encode()

    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        sampler, draws = Sampler(WideTexts()), _mixed_draws()
        logits = scale * torch.randn(len(draws), 20011, generator=torch.Generator().manual_seed(1))
        alone = [sampler.sample(logits[row : row + 1], [draw])[0] for row, draw in enumerate(draws)]
        assert all(isinstance(one, Sampled) for one in alone)
        for shift in (0, 3, 8):
            order = [(row + shift) % len(draws) for row in range(len(draws))]
            together = sampler.sample(logits[order], [draws[row] for row in order])
            assert together == [alone[row] for row in order]
    finally:
        torch.set_num_threads(before)


def test_a_draw_depends_on_seed_and_position_and_on_nothing_else() -> None:
    logits = torch.randn(20, 50, generator=torch.Generator().manual_seed(0))

    def answer(draw: Draw) -> list[int]:
        tokens = []
        for row in logits:
            (token,) = draw_tokens(row[None].clone(), [draw])
            assert draw_tokens(row[None].clone(), [draw]) == [token]  # A step that is computed again.
            draw.accept(token)
            tokens.append(token)
        return tokens

    options = {"temperature": 1.0, "top_p": 0.9}
    assert answer(_draw(seed="7", **options)) == answer(_draw(seed="7", **options))
    assert answer(_draw(seed="7", **options)) != answer(_draw(seed="8", **options))
    assert answer(_draw(**options)) != answer(_draw(**options))


def test_random_numbers_are_uniform() -> None:
    draw, numbers = _draw(seed="x"), []
    for _ in range(NUM_DRAWS):
        numbers.append(draw.number())
        draw.accept(0)
    assert 0 <= min(numbers) <= max(numbers) < 1
    assert chisquare(torch.histc(torch.tensor(numbers), bins=20, min=0, max=1).tolist()).pvalue > LEAST_P_VALUE


def test_log_probabilities_are_those_of_the_plain_softmax(tokenizer: PreTrainedTokenizerFast) -> None:
    logits = torch.zeros(1, 259)
    logits[0, 65] = 3.0
    for draw in (_draw(logprobs=2), _draw(logprobs=2, temperature=1e-3, top_k=1, presence_penalty=2.0)):
        (result,) = Sampler(TokenTexts(tokenizer)).sample(logits, [draw])
        assert isinstance(result, Sampled)
        assert result.token_id == 65
        assert result.logprob is not None
        assert result.logprob.chosen == result.logprob.top[0]
        assert result.logprob.chosen.logprob == pytest.approx(3 - math.log(math.exp(3) + 258), abs=1e-5)
        assert result.logprob.chosen.raw == tokenizer.decode([65]).encode()
        assert len(result.logprob.top) == 2
    assert Sampler(TokenTexts(tokenizer)).sample(logits, [_draw()]) == [Sampled(65, None)]


def test_a_row_that_is_not_finite_fails_alone_and_names_its_model(tokenizer: PreTrainedTokenizerFast) -> None:
    logits = torch.zeros(4, 259)
    logits[0, 3] = math.nan
    logits[2, 4] = math.inf
    logits[3, 4] = -math.inf
    logits[1, 5] = 1.0
    params = SamplingParams(max_tokens=1, temperature=1.0, logprobs=1)
    draws = [Draw(params, model_name="adapter 'boolq@v1'"), _draw(), _draw(), _draw(temperature=1.0)]
    results = Sampler(TokenTexts(tokenizer)).sample(logits, draws)
    assert results[1] == Sampled(5, None)
    assert [isinstance(one, AdapterHubError) for one in results] == [True, False, True, True]
    assert str(results[0]) == (
        "The model gave values that are not finite with adapter 'boolq@v1'. "
        "Choose another version; the adapter may have been trained with too high a learning rate."
    )


def test_a_padded_vocabulary_is_never_drawn_from(tokenizer: PreTrainedTokenizerFast) -> None:
    logits = torch.zeros(2, 300)
    logits[:, 280] = 50.0
    draws = [
        _draw(),
        Draw(SamplingParams(max_tokens=1, repetition_penalty=2.0, temperature=1.0), prompt_token_ids=[290]),
    ]
    results = Sampler(TokenTexts(tokenizer)).sample(logits, draws)
    assert all(isinstance(one, Sampled) and one.token_id < 259 for one in results)


def test_an_empty_batch_gives_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    assert Sampler(TokenTexts(tokenizer)).sample(torch.zeros(0, 259), []) == []
