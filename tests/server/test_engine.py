"""The promises of every engine, then those of the native one, over a fake runner.

The fake runner reads every row's history back through its blocks and checks the epoch, so a wrong block, slot or
adapter changes an answer or fails an assertion.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

import pytest

from adapterhub.base.prompts import text_token_ids
from adapterhub.errors import AdapterLoadError, ContextTooLongError, OverloadedError, RequestError
from server.engine.engine import NativeEngine
from server.engine.fake import FakeEngine
from server.engine.types import (
    Engine,
    ErrorEvent,
    FinishEvent,
    TokenEvent,
)
from tests.support.engines import BASE, TOKENIZER, collect, expected_answer, handle, request, running, tokens_of, until
from tests.support.fake_runner import FakeRunner

# What every engine promises.


@pytest.fixture(params=["native", "fake"])
async def any_engine(request: pytest.FixtureRequest) -> AsyncGenerator[Engine, None]:
    if request.param == "fake":
        engine: Engine = FakeEngine(
            TOKENIZER, lambda text: text_token_ids(TOKENIZER, text), context_tokens=128, broken=["digest-broken"]
        )
    else:
        runner = FakeRunner()
        runner.broken_loads = {"broken"}
        engine = NativeEngine(runner, TOKENIZER, BASE)
    await engine.start()
    await engine.start()
    yield engine
    await engine.stop()
    await engine.stop()


async def test_an_answer_is_token_events_and_one_terminal_event(any_engine: Engine) -> None:
    events = await collect(any_engine, request("r", "a"))
    assert all(isinstance(event, TokenEvent) for event in events[:-1])
    assert events[-1] == FinishEvent("length", 5, 8)
    assert len(events) == 9
    assert any_engine.status().num_running == 0


async def test_the_same_request_gives_the_same_answer(any_engine: Engine) -> None:
    assert await tokens_of(any_engine, request("1", "a")) == await tokens_of(any_engine, request("2", "a"))


async def test_different_adapters_give_different_answers(any_engine: Engine) -> None:
    names = [None, "alpha", "beta"]
    answers = await asyncio.gather(*(collect(any_engine, request(f"{name}", name)) for name in names))
    texts = ["".join(event.text for event in answer[:-1]) for answer in answers]
    assert len(set(texts)) == 3


async def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(any_engine: Engine) -> None:
    free = await collect(any_engine, request("free", "a", max_tokens=20))
    text = "".join(event.text for event in free[:-1])
    stop = text[6:8]
    events = await collect(any_engine, request("cut", "a", max_tokens=20, stop=(stop,)))
    assert "".join(event.text for event in events[:-1]) == text[: text.index(stop)]
    assert events[-1].reason == "stop"


async def test_log_probabilities_come_only_when_asked_for(any_engine: Engine) -> None:
    plain = await collect(any_engine, request("plain"))
    scored = await collect(any_engine, request("scored", logprobs=1))
    assert all(event.logprob is None for event in plain[:-1])
    for event in scored[:-1]:
        assert event.logprob.chosen.token_id == event.token_id
        assert event.logprob.top[0] == event.logprob.chosen


async def test_a_broken_adapter_fails_only_its_own_requests(any_engine: Engine) -> None:
    broken, fine = await asyncio.gather(
        collect(any_engine, request("b", "broken")), collect(any_engine, request("f", "a"))
    )
    assert len(broken) == 1
    assert isinstance(broken[0].error, AdapterLoadError)
    assert str(broken[0].error).startswith("Adapter 'broken@v1' cannot be loaded: ")
    assert isinstance(fine[-1], FinishEvent)
    with pytest.raises(AdapterLoadError, match="cannot be loaded"):
        await any_engine.load(handle("broken"))


async def test_loading_makes_an_adapter_resident(any_engine: Engine) -> None:
    assert any_engine.resident() == []
    await any_engine.load(handle("a"))
    await until(lambda: any_engine.resident() == ["digest-a"])


async def test_unloading_an_adapter_forgets_it(any_engine: Engine) -> None:
    await any_engine.load(handle("a"))
    await until(lambda: any_engine.residency() == {"digest-a": "device"})
    assert await any_engine.unload("digest-a")
    assert any_engine.residency() == {}
    assert await any_engine.unload("digest-a")
    assert isinstance((await collect(any_engine, request("r", "a")))[-1], FinishEvent)


async def test_a_request_longer_than_the_context_is_refused(any_engine: Engine) -> None:
    with pytest.raises(ContextTooLongError, match=r"^Request 'r' needs 129 tokens; the context has 128\. Shorten"):
        await collect(any_engine, request("r", max_tokens=124))


async def test_a_prompt_without_tokens_is_refused(any_engine: Engine) -> None:
    empty = replace(request("r"), prompt_token_ids=())
    with pytest.raises(RequestError, match=r"^Request 'r' has a prompt of 0 tokens\. Send at least one\.$"):
        await collect(any_engine, empty)


async def test_closing_the_generator_cancels_the_request(any_engine: Engine) -> None:
    async with aclosing(any_engine.generate(request("r", max_tokens=100))) as events:
        await anext(events)
    await until(lambda: any_engine.status().num_running == 0)
    if isinstance(any_engine, FakeEngine):
        assert any_engine.cancelled == ["r"]


async def test_a_stopped_engine_refuses(any_engine: Engine) -> None:
    await any_engine.stop()
    assert not any_engine.status().is_ready
    with pytest.raises(OverloadedError):
        await collect(any_engine, request("late"))


async def test_stopping_ends_a_request_in_flight_with_an_error(any_engine: Engine) -> None:
    async with aclosing(any_engine.generate(request("r", max_tokens=100))) as events:
        await anext(events)
        await any_engine.stop()
        rest = [event async for event in events]
    assert isinstance(rest[-1], ErrorEvent | FinishEvent)  # It may just have finished.
    if isinstance(rest[-1], ErrorEvent):
        assert str(rest[-1].error) == "The server is shutting down. Send the request again later."


# What the native engine promises.


async def test_answers_follow_the_model_whatever_runs_beside_them() -> None:
    runner = FakeRunner(num_blocks=128)
    prompts = ["a", "bc" * 9, "hello world", "x" * 40]
    asked = [
        request(f"{idx}", [None, "a", "b"][idx % 3], prompt=prompts[idx % 4], max_tokens=3 + idx) for idx in range(16)
    ]
    async with running(runner, max_step_tokens=16) as engine:
        answers = await asyncio.gather(*(tokens_of(engine, one) for one in asked))
    assert answers == [expected_answer(one) for one in asked]


async def test_requests_that_arrive_together_run_in_one_batch() -> None:
    runner = FakeRunner()
    runner.gate.clear()
    async with running(runner) as engine:
        blocker = asyncio.create_task(tokens_of(engine, request("first", max_tokens=1)))
        await until(lambda: engine.status().num_running == 1)
        for name in "abc":
            await engine.load(handle(name))
        asked = [request(f"{name}", name, max_tokens=6) for name in (None, "a", "b", "c")]
        tasks = [asyncio.create_task(tokens_of(engine, one)) for one in asked]
        await until(lambda: engine.status().num_waiting == 4)
        runner.gate.set()
        answers = await asyncio.gather(*tasks)
        await blocker
    assert answers == [expected_answer(one) for one in asked]
    assert len(runner.steps) == 1 + 6  # One for the first request, then six for all four together.
    assert all(len({row.slot for row in rows}) == 4 for rows in runner.steps[1:])


async def test_the_key_value_memory_may_be_smaller_than_what_is_asked_for() -> None:
    runner = FakeRunner(num_blocks=14, block_size=4)  # 56 tokens for three times 45.
    asked = [request(f"{idx}", "a", max_tokens=40) for idx in range(3)]
    async with running(runner) as engine:
        assert engine.context_tokens == 56
        answers = await asyncio.gather(*(tokens_of(engine, one) for one in asked))
    assert answers == [expected_answer(one) for one in asked]


async def test_churn_of_slots_and_cancellations_never_changes_an_answer() -> None:
    runner = FakeRunner(num_slots=2, num_blocks=40, step_s=0.0005)
    long = request("long", "steady", max_tokens=60)
    async with running(runner, max_sequences=4) as engine:
        steady = asyncio.create_task(tokens_of(engine, long))
        for idx in range(30):
            asked = request(f"{idx}", f"churn{idx % 5}", max_tokens=3)
            if idx % 3 == 0:
                async with aclosing(engine.generate(asked)) as events:
                    await anext(events)
            else:
                assert await tokens_of(engine, asked) == expected_answer(asked)
        assert await steady == expected_answer(long)


async def test_an_end_token_ends_the_answer_and_has_no_text() -> None:
    class Ending(FakeRunner):
        def step(self, rows, *, epoch):
            logits = super().step(rows, epoch=epoch)
            if len(self.steps) == 3:
                logits[:, TOKENIZER.eos_token_id] = 9.0
            return logits

    async with running(Ending()) as engine:
        events = await collect(engine, request("r", logprobs=0))
    assert events[-1] == FinishEvent("stop", 5, 3)
    assert events[-2] == TokenEvent("", TOKENIZER.eos_token_id, None, offset=2)


async def test_a_seed_repeats_an_answer_in_any_company() -> None:
    async def answer(company: int) -> list[int]:
        async with running(FakeRunner()) as engine:
            others = [request(f"o{idx}", temperature=2.0) for idx in range(company)]
            asked = request("r", "a", temperature=2.0, seed="5", max_tokens=12)
            answers = await asyncio.gather(*(tokens_of(engine, one) for one in [*others, asked]))
            return answers[-1]

    assert await answer(0) == await answer(5)


async def test_values_that_are_not_finite_fail_only_their_request() -> None:
    runner = FakeRunner()
    runner.poisoned = {"bad"}
    async with running(runner) as engine:
        bad, fine = await asyncio.gather(
            collect(engine, request("bad", "bad")), tokens_of(engine, request("fine", "good"))
        )
    assert str(bad[-1].error) == (
        "The model gave values that are not finite with adapter 'bad@v1'. "
        "Choose another version; the adapter may have been trained with too high a learning rate."
    )
    assert fine == expected_answer(request("fine", "good"))


async def test_a_row_that_breaks_its_step_fails_alone_and_the_others_go_on() -> None:
    runner = FakeRunner()
    runner.broken_steps = {"heavy"}
    async with running(runner) as engine:
        await engine.load(handle("heavy"))
        runner.gate.clear()
        asked = [request(f"{idx}", [None, "a", "b"][idx % 3], max_tokens=12) for idx in range(7)]
        tasks = [asyncio.create_task(tokens_of(engine, one)) for one in asked]
        heavy = asyncio.create_task(collect(engine, request("h", "heavy")))
        await until(lambda: engine.status().num_running + engine.status().num_waiting == 8)
        runner.gate.set()
        events = await heavy
        assert [task.result() for task in tasks if task.done()] == []  # They ran beside it, and go on.
        assert await asyncio.gather(*tasks) == [expected_answer(one) for one in asked]
        assert str(events[-1].error) == (
            "The step failed: out of memory. Send the request again; report the server's log."
        )
        assert await tokens_of(engine, request("f")) == expected_answer(request("f"))


async def test_a_request_that_is_closed_after_its_first_token_takes_hardly_another_step() -> None:
    runner = FakeRunner(step_s=0.01)
    async with running(runner) as engine:
        async with aclosing(engine.generate(request("r", max_tokens=100))) as events:
            await anext(events)
        await until(lambda: engine.status().num_running == 0)
    assert len(runner.steps) < 30  # An answer that ended by itself would have taken 100.


async def test_a_cancelled_request_frees_its_place_while_waiting_and_while_running() -> None:
    runner = FakeRunner(num_slots=1, step_s=0.002)
    async with running(runner) as engine:
        first = asyncio.create_task(collect(engine, request("first", "a", max_tokens=100)))
        await until(lambda: engine.status().num_running == 1)
        second = asyncio.create_task(collect(engine, request("second", "b")))
        await until(lambda: engine.status().num_waiting == 1)
        for task in (second, first):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await until(lambda: engine.status().num_running == 0)
        num_steps = len(runner.steps)
        await asyncio.sleep(0.02)
        assert len(runner.steps) == num_steps


async def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    runner = FakeRunner()
    runner.gate.clear()
    async with running(runner, max_sequences=1, max_waiting=2) as engine:
        tasks = [asyncio.create_task(collect(engine, request("0")))]
        await until(lambda: engine.status().num_running == 1)
        tasks += [asyncio.create_task(collect(engine, request(f"{idx}"))) for idx in (1, 2)]
        await until(lambda: engine.status().num_waiting == 2)
        message = (
            r"^The queue is full: 2 requests with 10 prompt tokens wait; at most 2 requests and 1048576 tokens may\. "
            r"Send the request again in 4 s\.$"
        )
        with pytest.raises(OverloadedError, match=message):
            await collect(engine, request("more"))
        runner.gate.set()
        for events in await asyncio.gather(*tasks):
            assert isinstance(events[-1], FinishEvent)


async def test_a_queue_filled_by_one_tenant_takes_another_ones_share() -> None:
    runner = FakeRunner()
    runner.gate.clear()
    async with running(runner, max_sequences=1, max_waiting=4) as engine:

        def ask(name: str, tenant: str) -> asyncio.Task:
            return asyncio.create_task(collect(engine, replace(request(name, max_tokens=1), tenant=tenant)))

        tasks = [ask("0", "crowd")]
        await until(lambda: engine.status().num_running == 1)
        tasks += [ask(f"{idx}", "crowd") for idx in range(1, 5)]
        await until(lambda: engine.status().num_waiting == 4)
        tasks += [ask("5", "other"), ask("6", "other")]
        await until(lambda: engine.status().num_waiting == 6)
        for tenant in ("crowd", "other"):
            with pytest.raises(OverloadedError, match="The queue is full: 6 requests"):
                await ask("more", tenant)
        runner.gate.set()
        assert all(isinstance(events[-1], FinishEvent) for events in await asyncio.gather(*tasks))


async def test_the_queue_is_bounded_by_tokens_too() -> None:
    runner = FakeRunner()
    runner.gate.clear()
    async with running(runner, max_sequences=1, max_waiting_tokens=8) as engine:
        tasks = [asyncio.create_task(collect(engine, request("0")))]
        await until(lambda: engine.status().num_running == 1)
        tasks += [asyncio.create_task(collect(engine, request(f"{idx}"))) for idx in (1, 2)]
        await until(lambda: engine.status().num_waiting == 2)
        with pytest.raises(OverloadedError, match="2 requests with 10 prompt tokens wait"):
            await collect(engine, request("more"))
        runner.gate.set()
        await asyncio.gather(*tasks)


async def test_stopping_ends_requests_in_flight_with_an_error() -> None:
    runner = FakeRunner(num_slots=1, step_s=0.005)
    engine = NativeEngine(runner, TOKENIZER, BASE)
    await engine.start()
    tasks = [asyncio.create_task(collect(engine, request(f"{name}", name, max_tokens=90))) for name in "ab"]
    await until(lambda: engine.status().num_running == 1)
    await engine.stop()
    for events in await asyncio.gather(*tasks):
        assert str(events[-1].error) == "The server is shutting down. Send the request again later."
    assert engine.status().num_waiting == 0


async def test_requests_with_one_id_do_not_disturb_each_other() -> None:
    async with running(FakeRunner()) as engine:
        asked = [request("same", name, max_tokens=length) for name, length in (("a", 9), ("b", 4), (None, 6))]
        first = engine.generate(request("same", "c", max_tokens=50))
        await anext(first)
        answers = asyncio.gather(*(tokens_of(engine, one) for one in asked))
        await first.aclose()
        assert await answers == [expected_answer(one) for one in asked]


async def test_an_engine_that_was_not_started_refuses() -> None:
    engine = NativeEngine(FakeRunner(), TOKENIZER, BASE)
    await engine.stop()
    assert engine.resident() == []
    assert not engine.status().is_ready
    with pytest.raises(OverloadedError, match=r"^The engine is not running\. Send the request again later\.$"):
        await collect(engine, request("r"))
    with pytest.raises(OverloadedError, match=r"^The engine is not running\. Start it first\.$"):
        await engine.load(handle("a"))
