"""Adapters that lose their slot stay on the host, within its bytes, and come back without the disk."""

from __future__ import annotations

import asyncio

from server.engine.eviction import GreedyDual
from tests.support.engines import expected_answer, handle, request, running, tokens_of, until
from tests.support.fake_runner import FakeRunner


def _on_host(engine) -> list[str]:
    return [digest.removeprefix("digest-") for digest, tier in engine.residency().items() if tier == "host"]


async def test_an_adapter_that_lost_its_slot_comes_back_without_the_disk() -> None:
    runner = FakeRunner(num_slots=1)
    async with running(runner) as engine:
        for name in "abcabcabc":
            assert await tokens_of(engine, request(name, name)) == expected_answer(request(name, name))
        assert engine.residency() == {"digest-a": "host", "digest-b": "host", "digest-c": "device"}
    assert runner.loads == ["a", "b", "c"]
    assert len(runner.writes) == 9


async def test_the_host_keeps_no_more_bytes_than_it_may() -> None:
    runner = FakeRunner(num_slots=2)
    runner.sizes = {"large": 3 << 20}
    async with running(runner, host_adapter_mib=4) as engine:
        for name in ("large", *"abcdefgh", "large"):
            await tokens_of(engine, request(name, name))
            assert sum(runner.sizes.get(one, 1 << 20) for one in _on_host(engine)) <= 4 << 20
        assert len(engine.resident()) > 4


async def test_without_room_on_the_host_adapters_are_still_served() -> None:
    runner = FakeRunner(num_slots=1)
    asked = [request(f"{idx}", "abc"[idx % 3]) for idx in range(12)]
    async with running(runner, host_adapter_mib=0) as engine:
        assert await asyncio.gather(*(tokens_of(engine, one) for one in asked)) == [
            expected_answer(one) for one in asked
        ]
        assert len(engine.resident()) == 1


async def test_an_adapter_on_the_host_is_not_read_again_when_it_is_loaded_ahead() -> None:
    runner = FakeRunner(num_slots=1)
    async with running(runner) as engine:
        for name in "ab":
            await tokens_of(engine, request(name, name))
        await engine.load(handle("a"))
        await until(lambda: len(engine.resident()) == 2)
    assert runner.loads == ["a", "b"]


async def test_many_adapters_take_turns_on_few_slots_without_rewriting_more_than_needed() -> None:
    runner = FakeRunner(num_slots=2, num_blocks=256)
    asked = [request(f"{idx}", f"adapter{idx % 6}", max_tokens=4) for idx in range(48)]
    async with running(runner) as engine:
        answers = await asyncio.gather(*(tokens_of(engine, one) for one in asked))
    assert answers == [expected_answer(one) for one in asked]
    assert len(runner.loads) == 6
    assert len(runner.writes) <= 2 * 6  # In order of arrival it would be one for nearly every request.


def test_of_equal_use_the_large_and_cheap_goes_first_and_use_makes_up_for_it() -> None:
    worth: GreedyDual[str] = GreedyDual()
    for name, cost, size in (("small", 1.0, 10), ("large", 1.0, 100), ("dear", 5.0, 100)):
        worth.add(name, cost=cost, size=size)
        worth.use(name)
    assert worth.worst(["small", "large", "dear"]) == "large"
    for _ in range(20):
        worth.use("large")
    assert worth.worst(["small", "large", "dear"]) == "dear"


def test_what_was_used_often_long_ago_goes_in_time() -> None:
    worth: GreedyDual[str] = GreedyDual()
    worth.add("old", cost=1, size=1)
    for _ in range(5):
        worth.use("old")
    for idx in range(20):
        worth.add(f"{idx}", cost=1, size=1)
        worth.use(f"{idx}")
        worst = worth.worst(["old", f"{idx}"])
        worth.evict(worst)
        if worst == "old":
            return
    raise AssertionError("it is kept for ever")
