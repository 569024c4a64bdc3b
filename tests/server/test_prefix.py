"""Equal hashes mean equal keys and values: the same base, adapter, tenant, and every token up to there."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.prefix import block_hash, root_hash
from server.engine.types import AdapterHandle, FinishEvent
from tests.support.engines import collect, expected_answer, request, running, tokens_of
from tests.support.fake_runner import FakeRunner

PROMPT = "the same long beginning"  # 23 tokens: five full blocks of the fake runner, and some.


def _num_cached(events: list) -> int:
    assert isinstance(events[-1], FinishEvent)
    return events[-1].num_cached_tokens


FIELDS = st.tuples(st.text(max_size=3), st.none() | st.text(min_size=1, max_size=3), st.text(max_size=3))


@given(one=FIELDS, other=FIELDS)
def test_roots_are_equal_only_for_equal_base_adapter_and_tenant(one, other) -> None:
    roots = [root_hash(base, digest=digest, tenant=tenant) for base, digest, tenant in (one, other)]
    assert (roots[0] == roots[1]) == (one == other)


TOKENS = st.lists(st.integers(0, 3), min_size=2, max_size=2)


@given(one=st.lists(TOKENS, max_size=3), other=st.lists(TOKENS, max_size=3))
def test_chains_are_equal_only_for_equal_beginnings(one, other) -> None:
    def chain(blocks) -> bytes:
        parent = root_hash("base", digest=None, tenant="")
        for block in blocks:
            parent = block_hash(parent, block)
        return parent

    assert (chain(one) == chain(other)) == (one == other)


async def test_a_repeated_prompt_is_computed_once_and_answered_alike() -> None:
    runner = FakeRunner()
    asked = request("r", "a", prompt=PROMPT)
    async with running(runner) as engine:
        first, second = await collect(engine, asked), await collect(engine, asked)
        assert engine.status().num_cached_prompt_tokens == 20
    assert [_num_cached(events) for events in (first, second)] == [0, 20]
    assert first[:-1] == second[:-1]
    assert len(runner.steps[8][0].token_ids) == 3  # What is left of the second prompt.


async def test_a_prompt_of_full_blocks_still_computes_its_last_token() -> None:
    asked = request("r", prompt="x" * 8)
    async with running(FakeRunner()) as engine:
        await collect(engine, asked)
        events = await collect(engine, asked)
    assert _num_cached(events) == 4
    assert [event.token_id for event in events[:-1]] == expected_answer(asked)


async def test_the_next_turn_of_a_conversation_reuses_the_answer_too() -> None:
    first = request("1", "a", prompt=PROMPT, max_tokens=10)
    async with running(FakeRunner()) as engine:
        answer = await tokens_of(engine, first)
        history = (*first.prompt_token_ids, *answer, 5, 6, 7)
        events = await collect(engine, replace(request("2", "a"), prompt_token_ids=history))
    assert _num_cached(events) == 32  # 23 and 9 computed tokens; the tenth token was never computed.


async def test_the_same_name_with_other_content_never_reuses_anything() -> None:
    asked = request("1", "a", prompt=PROMPT)
    assert asked.adapter is not None
    renewed = replace(
        asked, adapter=AdapterHandle.alone("another digest", request("", "b").adapter.parts[0].open_view, "a@v1")
    )
    async with running(FakeRunner()) as engine:
        await collect(engine, asked)
        events = await collect(engine, renewed)
    assert _num_cached(events) == 0
    assert [event.token_id for event in events[:-1]] == expected_answer(request("", "b", prompt=PROMPT))


@pytest.mark.parametrize("adapter", [None, "a"])
async def test_another_tenant_never_reuses_anything(adapter: str | None) -> None:
    asked = replace(request("1", adapter, prompt=PROMPT), tenant="one")
    async with running(FakeRunner()) as engine:
        await collect(engine, asked)
        other, same = await collect(engine, replace(asked, tenant="two")), await collect(engine, asked)
    assert [_num_cached(events) for events in (other, same)] == [0, 20]


async def test_answers_to_one_prompt_that_arrive_together_compute_it_once() -> None:
    runner = FakeRunner()
    asked = [request(f"{idx}", "a", prompt=PROMPT, temperature=1.0, seed=f"{idx}") for idx in range(5)]
    async with running(runner) as engine:
        answers = await asyncio.gather(*(collect(engine, one) for one in asked))
    assert sorted(_num_cached(events) for events in answers) == [0, 20, 20, 20, 20]


async def test_the_cache_can_be_switched_off() -> None:
    asked = request("r", "a", prompt=PROMPT)
    async with running(FakeRunner(), prefix_cache=False) as engine:
        await collect(engine, asked)
        assert _num_cached(await collect(engine, asked)) == 0
