"""A seed gives every answer random numbers of its own."""

from __future__ import annotations

from server.engine.sampling import Draw
from server.http.schema import CompletionBody


def _numbers(seed: int) -> list[float]:
    """The first random number of each answer to two prompts with three choices."""
    body = CompletionBody(prompt=["a", "b"], seed=seed, n=3)
    places = [(prompt_idx, choice_idx) for prompt_idx in range(2) for choice_idx in range(3)]
    return [Draw(body.sampling(8, prompt_idx=prompt, choice_idx=choice)).number() for prompt, choice in places]


def test_answers_of_one_and_of_neighbouring_seeds_differ() -> None:
    numbers = [number for seed in (-2, -1, 0, 1, 2) for number in _numbers(seed)]
    assert len(set(numbers)) == 5 * 6


def test_a_seed_repeats_its_numbers() -> None:
    assert _numbers(-1) == _numbers(-1)
