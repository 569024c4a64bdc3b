"""What goes wrong beside the model ends the requests it concerns and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adapterhub.errors import AdapterHubError, AdapterLoadError, OverloadedError, RequestError
from server.engine.engine import NativeEngine
from server.engine.types import AdapterHandle, ErrorEvent, FinishEvent, GenerateRequest, SamplingParams, TokenEvent
from tests.support.engines import BASE, TOKENIZER, collect, expected_answer, handle, request, running, tokens_of, until
from tests.support.fake_runner import FakeRunner


class _Padded(FakeRunner):
    """A model whose vocabulary was padded: its best tokens are none that the tokenizer knows."""

    def step(self, rows, *, epoch):
        logits = super().step(rows, epoch=epoch)
        return torch.cat([logits, torch.full((len(rows), 10), 9.0)], dim=1)


class _Surprised:
    """The usual tokenizer, which fails at one token."""

    def __init__(self, fails_at: int) -> None:
        self._fails_at = fails_at

    def __getattr__(self, name: str) -> Any:
        return getattr(TOKENIZER, name)

    def decode(self, token_ids: Sequence[int], **options: Any) -> str:
        if self._fails_at in token_ids:
            raise ZeroDivisionError("oops")
        return TOKENIZER.decode(token_ids, **options)


async def test_tokens_that_the_tokenizer_does_not_know_are_never_chosen() -> None:
    async with running(_Padded()) as engine:
        asked = [request("greedy", logprobs=20), request("drawn", temperature=1.0, top_p=0.5, seed="1")]
        answers = await asyncio.gather(*(collect(engine, one) for one in asked))
        assert engine.status().is_ready
    assert [event.token_id for event in answers[0][:-1]] == expected_answer(asked[0])
    for events in answers:
        assert isinstance(events[-1], FinishEvent)
        assert all(event.token_id < len(TOKENIZER) for event in events if isinstance(event, TokenEvent))


async def test_a_row_that_fails_after_the_step_ends_its_own_request_only(caplog: pytest.LogCaptureFixture) -> None:
    bad, fine = request("bad", prompt="bad"), request("fine", prompt="fine", max_tokens=3)
    fails_at = expected_answer(bad)[2]
    assert fails_at not in expected_answer(fine)
    async with running(FakeRunner(), _Surprised(fails_at)) as engine:
        failed, answer = await asyncio.gather(collect(engine, bad), tokens_of(engine, fine))
        assert await tokens_of(engine, fine) == answer
    assert answer == expected_answer(fine)
    assert str(failed[-1].error) == (
        "The answer to request 'bad' cannot be continued: oops. Report the request with the server's log."
    )
    assert "request bad failed after its step" in caplog.text


async def test_values_that_cannot_be_drawn_from_end_their_requests_only() -> None:
    class Empty(FakeRunner):
        def step(self, rows, *, epoch):
            logits = super().step(rows, epoch=epoch)
            return logits[:, :0] if len(self.steps) == 1 else logits

    async with running(Empty()) as engine:
        events = await collect(engine, request("r"))
        assert await tokens_of(engine, request("s")) == expected_answer(request("s"))
    assert str(events[-1].error).startswith("The answer to request 'r' cannot be continued: ")


async def test_prompt_tokens_that_the_model_does_not_know_are_refused() -> None:
    asked = GenerateRequest(
        request_id="r", prompt_token_ids=(1, 99999), adapter=None, sampling=SamplingParams(max_tokens=1)
    )
    async with running(FakeRunner()) as engine:
        with pytest.raises(RequestError) as refused:
            await collect(engine, asked)
    size = FakeRunner().vocab_size
    assert str(refused.value) == (
        f"Token id 99999 is not in the vocabulary of 'tiny', which has {size}. Send ids from 0 to {size - 1}."
    )


async def test_an_engine_whose_thread_died_is_not_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    class Panic(BaseException):
        """What the Rust libraries raise."""

    def broken(*_: object, **__: object) -> None:
        raise Panic("oops")

    engine = NativeEngine(FakeRunner(), TOKENIZER, BASE)
    assert engine.status().is_alive
    await engine.start()
    assert engine.status().is_alive
    monkeypatch.setattr("server.engine.scheduler.Scheduler.schedule", broken)
    async with asyncio.timeout(5):
        events = await collect(engine, request("r"))
    assert str(events[-1].error) == "The engine stopped: oops. Restart the server and report its log."
    await until(lambda: not engine.status().is_alive)


async def test_a_stopped_engine_is_alive() -> None:
    engine = NativeEngine(FakeRunner(), TOKENIZER, BASE)
    await engine.start()
    await engine.stop()
    assert engine.status().is_alive


async def test_giving_up_on_a_load_leaves_it_to_the_others() -> None:
    runner = FakeRunner()
    runner.load_s = {"a": 0.1}
    asked = request("r", "a")
    async with running(runner) as engine, asyncio.timeout(5):
        impatient = asyncio.create_task(engine.load(handle("a")))
        await asyncio.sleep(0.02)
        impatient.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await impatient
        assert await tokens_of(engine, asked) == expected_answer(asked)
    assert runner.loads == ["a"]


async def test_loads_left_at_the_end_fail_and_no_other_begins() -> None:
    runner = FakeRunner()
    runner.load_s = dict.fromkeys("abcd", 0.1)
    engine = NativeEngine(runner, TOKENIZER, BASE)
    await engine.start()
    loads = [asyncio.create_task(engine.load(handle(name))) for name in "abcd"]
    await asyncio.sleep(0.02)
    await engine.stop()
    async with asyncio.timeout(5):
        outcomes = await asyncio.gather(*loads, return_exceptions=True)
        with pytest.raises(OverloadedError, match=r"^The engine is not running\. Start it first\.$"):
            await engine.load(handle("e"))
    assert [str(one) for one in outcomes[2:]] == [
        f"Adapter '{name}@v1' cannot be loaded: The server is shutting down. Ask another server, or again later."
        for name in "cd"
    ]
    assert sorted(runner.loads) == ["a", "b"]


async def test_a_long_queue_of_adapters_is_loaded_piece_by_piece() -> None:
    runner = FakeRunner(num_slots=2, num_blocks=128, step_s=0.001)
    asked = [request(f"{idx}", f"adapter{idx}", max_tokens=12) for idx in range(24)]
    most = 0
    async with running(runner, host_adapter_mib=3) as engine:
        tasks = [asyncio.create_task(tokens_of(engine, one)) for one in asked]
        while not all(task.done() for task in tasks):
            most = max(most, len(engine.resident()))
            await asyncio.sleep(0.001)
        answers = [task.result() for task in tasks]
    assert answers == [expected_answer(one) for one in asked]
    assert most <= 2 + 2 + 3 + 1  # In slots, ready for the next ones, within 3 MiB, and one that was just loaded.


async def test_a_load_that_hangs_fails_its_requests_and_nobody_else() -> None:
    runner = FakeRunner(num_slots=1)
    runner.load_gates = {name: threading.Event() for name in ("stuck1", "stuck2", "stuck3")}
    expected = (
        "Adapter 'stuck1@v1' cannot be loaded: it takes longer than 0.2 s. "
        "Check it with `hub adapters verify stuck1@v1`, or choose another version."
    )
    async with running(runner, load_timeout_s=0.2) as engine, asyncio.timeout(10):
        stuck = [asyncio.create_task(collect(engine, request(name, name))) for name in runner.load_gates]
        fine = asyncio.create_task(tokens_of(engine, request("f", "good")))
        answers = await asyncio.gather(*stuck)
        assert [len(events) for events in answers] == [1, 1, 1]
        assert str(answers[0][0].error) == expected
        assert await fine == expected_answer(request("f", "good"))
        again = await collect(engine, request("again", "stuck1"))
        assert [str(event.error) for event in again] == [expected]
        with pytest.raises(AdapterLoadError, match="it takes longer than"):
            await engine.load(handle("stuck1"))
        assert runner.loads == ["good"]  # No second thread hangs.
        runner.load_gates["stuck1"].set()
        await until(lambda: "stuck1" in runner.loads)
        assert await _until_answered(engine, "stuck1") == expected_answer(request("r", "stuck1"))


async def _until_answered(engine: NativeEngine, adapter: str) -> list[int]:
    while True:
        events = await collect(engine, request("r", adapter))
        if isinstance(events[-1], FinishEvent):
            return [event.token_id for event in events[:-1]]


async def test_slow_loads_do_not_hold_up_the_loads_of_others() -> None:
    runner = FakeRunner(num_slots=1)
    runner.load_gates = {name: threading.Event() for name in ("slow1", "slow2")}
    async with running(runner) as engine, asyncio.timeout(20):
        slow = [asyncio.create_task(tokens_of(engine, request(name, name))) for name in runner.load_gates]
        await asyncio.sleep(0.01)
        assert await tokens_of(engine, request("f", "good")) == expected_answer(request("f", "good"))
        assert not any(task.done() for task in slow)
        for gate in runner.load_gates.values():
            gate.set()
        assert await asyncio.gather(*slow) == [expected_answer(request("", name)) for name in runner.load_gates]


async def test_an_adapter_deleted_while_its_request_waits_fails_that_request_once() -> None:
    def deleted() -> Path:
        raise FileNotFoundError("the view is gone")

    runner = FakeRunner(num_slots=1, step_s=0.002)
    gone = replace(request("g"), adapter=AdapterHandle.alone("digest-gone", deleted, "gone@v1"))
    async with running(runner) as engine:
        first = asyncio.create_task(tokens_of(engine, request("f", "a", max_tokens=30)))
        await until(lambda: engine.status().num_running == 1)
        events = await collect(engine, gone)
        assert await first == expected_answer(request("f", "a", max_tokens=30))
    assert [str(event.error) for event in events] == [
        "Adapter 'gone@v1' cannot be loaded: the view is gone. "
        "Check it with `hub adapters verify gone@v1`, or choose another version."
    ]


async def test_a_step_too_large_for_the_memory_runs_in_parts() -> None:
    class Small(FakeRunner):
        def step(self, rows, *, epoch):
            if len(rows) > 3:
                raise MemoryError("no memory")
            return super().step(rows, epoch=epoch)

    runner = Small(num_blocks=128)
    asked = [request(f"{idx}", [None, "a"][idx % 2], prompt="x" * (idx + 1)) for idx in range(10)]
    async with running(runner) as engine:
        answers = await asyncio.gather(*(tokens_of(engine, one) for one in asked))
    assert answers == [expected_answer(one) for one in asked]


async def test_a_step_is_refused_when_a_slot_was_written_since_it_was_planned() -> None:
    class Meddled(FakeRunner):
        """Writes a slot twice, so that one of the writes is in no plan."""

        def write_slot(self, slot, adapter):
            super().write_slot(slot, adapter)
            return super().write_slot(slot, adapter)

    asked = request("r", "a")
    async with running(Meddled()) as engine:
        events = await collect(engine, asked)
        assert isinstance(events[-1], ErrorEvent)
        assert str(events[-1].error).startswith("The step failed: ")
        assert await tokens_of(engine, asked) == expected_answer(asked)  # Planned after the writes.


async def test_a_mistake_in_the_loop_ends_every_request_and_readiness(monkeypatch, caplog) -> None:
    engine = NativeEngine(FakeRunner(), TOKENIZER, BASE)
    await engine.start()

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("server.engine.scheduler.Scheduler.schedule", broken)
    events = await collect(engine, request("r"))
    assert isinstance(events[-1], ErrorEvent)
    assert type(events[-1].error) is AdapterHubError
    assert str(events[-1].error) == "The engine stopped: oops. Restart the server and report its log."
    assert not engine.status().is_ready
    assert "the engine stopped after 0 steps" in caplog.text
    await engine.stop()
