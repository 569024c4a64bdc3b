"""Adapters of a native engine over the fake runner: loaded once, ahead, into free slots, and unloaded."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from server.engine.types import AdapterHandle
from tests.support.engines import collect, expected_answer, handle, request, running, tokens_of, until
from tests.support.fake_runner import FakeRunner


async def test_more_adapters_than_slots_are_served_in_turn_and_correctly() -> None:
    runner = FakeRunner(num_slots=2, num_blocks=128)
    asked = [request(f"{idx}", f"adapter{idx % 7}", max_tokens=4) for idx in range(28)]
    async with running(runner) as engine:
        answers = await asyncio.gather(*(tokens_of(engine, one) for one in asked))
        tiers = engine.residency()
    assert sorted(tiers) == [f"digest-adapter{idx}" for idx in range(7)]
    assert sorted(tiers.values()) == ["device"] * 2 + ["host"] * 5
    assert answers == [expected_answer(one) for one in asked]
    assert len(runner.writes) >= 7
    assert len(runner.loads) == 7  # What lost its slot came back without the disk.


async def test_an_adapter_that_cannot_be_written_fails_only_its_requests() -> None:
    runner = FakeRunner(num_slots=2)
    runner.broken_writes = {"wide"}
    async with running(runner) as engine:
        wide, fine = await asyncio.gather(
            collect(engine, request("w", "wide")), tokens_of(engine, request("f", "good"))
        )
        assert str(wide[-1].error) == "Adapter digest-wide does not fit into a slot: too wide. Choose another version."
        assert fine == expected_answer(request("f", "good"))
        await engine.load(handle("wide"))  # It loads, but no slot takes it, and nothing breaks.
        assert await tokens_of(engine, request("g", "good")) == expected_answer(request("g", "good"))
    assert "digest-wide" not in engine.resident()


async def test_a_slow_load_does_not_stop_the_others() -> None:
    runner = FakeRunner()
    runner.load_s = {"slow": 2.0}  # Far longer than five requests take, also on a busy machine.
    async with running(runner) as engine:
        slow = asyncio.create_task(tokens_of(engine, request("s", "slow")))
        for idx in range(5):
            await tokens_of(engine, request(f"{idx}", "quick"))
        assert not slow.done()
        await slow
    assert runner.loads.count("quick") == 1


async def test_requests_of_one_adapter_share_one_load() -> None:
    runner = FakeRunner()
    runner.load_s = {"a": 0.05}
    async with running(runner) as engine:
        await asyncio.gather(*(tokens_of(engine, request(f"{idx}", "a")) for idx in range(6)))
    assert runner.loads == ["a"]
    assert len(runner.writes) == 1


async def test_loading_ahead_writes_the_slot_before_anyone_asks() -> None:
    runner = FakeRunner()
    async with running(runner) as engine:
        await engine.load(handle("a"))
        await until(lambda: runner.writes == [(0, "a")])
        await engine.load(handle("a"))
        await tokens_of(engine, request("r", "a"))
    assert runner.loads == ["a"]


async def test_loading_ahead_never_takes_a_slot_in_use() -> None:
    runner = FakeRunner(num_slots=1, step_s=0.002)
    async with running(runner) as engine:
        task = asyncio.create_task(tokens_of(engine, request("r", "a", max_tokens=30)))
        await until(lambda: runner.writes)
        await engine.load(handle("b"))
        await until(lambda: len(engine.resident()) == 2)
        assert await task == expected_answer(request("r", "a", max_tokens=30))
        assert runner.writes == [(0, "a")]
        await tokens_of(engine, request("s", "b"))
    assert runner.loads == ["a", "b"]


async def test_an_adapter_in_use_is_not_unloaded() -> None:
    runner = FakeRunner(num_slots=1, step_s=0.002)
    async with running(runner) as engine:
        task = asyncio.create_task(tokens_of(engine, request("r", "a", max_tokens=40)))
        await until(lambda: runner.writes)
        assert not await engine.unload("digest-a")
        waiting = asyncio.create_task(tokens_of(engine, request("s", "b", max_tokens=2)))
        await until(lambda: "digest-b" in engine.resident())
        assert not await engine.unload("digest-b")
        assert await task == expected_answer(request("r", "a", max_tokens=40))
        await waiting
        assert await engine.unload("digest-a")
        assert engine.resident() == ["digest-b"]
    assert not await engine.unload("digest-b")  # It has stopped.


async def test_a_mix_is_one_adapter_with_its_own_identity() -> None:
    runner = FakeRunner()
    parts = [replace(handle(name).parts[0], weight=weight) for name, weight in (("a", 0.5), ("b", -2.0))]
    mix = AdapterHandle.mixed(parts)
    asked = replace(request("r"), adapter=mix)
    async with running(runner) as engine:
        await collect(engine, asked)
        assert engine.resident() == [mix.digest]
        assert await tokens_of(engine, request("a", "a")) == expected_answer(request("a", "a"))
    assert runner.loads == ["0.5*a+-2*b", "a"]
