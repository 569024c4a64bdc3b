"""With a real model: reused blocks, pieces of prompts and preemption change no answer."""

from __future__ import annotations

import asyncio

import pytest

from adapterhub.base.identity import Base
from adapterhub.base.loading import load_model, load_tokenizer
from server.engine.engine import NativeEngine
from server.engine.runner import Runner
from server.engine.sequence import Limits
from server.engine.types import AdapterHandle, Event, GenerateRequest, SamplingParams, TokenEvent
from tests.support.adapters import write_adapter
from tests.support.engines import collect
from tests.support.rows import prompt
from tests.support.tiny_models import build_base

METHODS = ("lora", "dora", "ia3")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return build_base(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def handles(base: Base, tmp_path_factory: pytest.TempPathFactory) -> list[AdapterHandle | None]:
    folder = tmp_path_factory.mktemp("views")
    views = [write_adapter(folder / method, base, method=method, rank=5, as_view=True) for method in METHODS]
    return [None, *(AdapterHandle.alone(view.name, lambda view=view: view, view.name) for view in views)]


def _requests(handles: list[AdapterHandle | None]) -> list[GenerateRequest]:
    """For every adapter: a long prompt, the same again, and two with the same beginning."""
    beginning = prompt(22, seed=1)
    prompts = [beginning, beginning, [*beginning[:17], *prompt(4, seed=2)], [*beginning, *prompt(3, seed=3)]]
    return [
        GenerateRequest(
            request_id=f"{idx}",
            prompt_token_ids=tuple(tokens),
            adapter=handle,
            sampling=SamplingParams(max_tokens=8, logprobs=0),
        )
        for idx, tokens in enumerate(prompts)
        for handle in handles
    ]


async def _answers(base: Base, asked: list[GenerateRequest], **limits) -> tuple[list[list[Event]], int]:
    runner = Runner(load_model(base), base, num_slots=2, num_blocks=24, block_size=4)
    engine = NativeEngine(runner, load_tokenizer(base), base, limits=Limits(**limits))
    await engine.start()
    try:
        answers = await asyncio.gather(*(collect(engine, one) for one in asked))
        return answers, engine.status().num_cached_prompt_tokens
    finally:
        await engine.stop()


async def test_answers_of_a_real_model_are_the_same_with_and_without_reuse(
    base: Base, handles: list[AdapterHandle | None]
) -> None:
    asked = _requests(handles)
    expected = [(await _answers(base, [one], prefix_cache=False))[0][0] for one in asked]
    found, num_cached = await _answers(base, asked, max_step_tokens=16, max_sequences=8)
    assert num_cached > 100
    for events, wanted in zip(found, expected, strict=True):
        pairs = list(zip(events[:-1], wanted[:-1], strict=True))
        for one, other in pairs:
            assert isinstance(one, TokenEvent)
            assert isinstance(other, TokenEvent)
            assert one.token_id == other.token_id
            if other.logprob is not None:
                assert one.logprob is not None
                assert one.logprob.chosen.logprob == pytest.approx(other.logprob.chosen.logprob, abs=1e-4)
