"""Nothing is left behind and nothing is mixed up, however much comes and goes."""

from __future__ import annotations

import asyncio
import random
from contextlib import aclosing
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.engine import NativeEngine
from server.engine.types import GenerateRequest, TokenEvent
from tests.support.engines import expected_answer, handle, request, running, tokens_of, until
from tests.support.fake_runner import FakeRunner


async def test_ten_thousand_short_requests_leave_no_block_and_no_slot_in_use() -> None:
    runner = FakeRunner(num_slots=3, num_blocks=200)
    rng = random.Random(1)

    async def client(number: int, engine: NativeEngine) -> None:
        for idx in range(50):
            asked = request(
                f"{number}-{idx}",
                rng.choice([None, *"abcdef"]),
                prompt=rng.choice(["hello", "hello world", "x"]),
                max_tokens=rng.randint(1, 3),
            )
            if rng.random() < 0.1:
                async with aclosing(engine.generate(asked)) as events:
                    await anext(events)
            else:
                assert await tokens_of(engine, asked) == expected_answer(asked)

    async with running(runner, max_sequences=64, host_adapter_mib=2) as engine:
        await asyncio.gather(*(client(number, engine) for number in range(200)))
        await until(lambda: engine.status().num_running == 0)
        assert engine.status().num_waiting == 0
        engine.check_integrity()  # Nothing runs, so it fails for any block or slot that has a user.


async def test_a_thousand_loads_unloads_and_swaps_under_traffic_never_mix_up_an_answer() -> None:
    runner = FakeRunner(num_slots=2, num_blocks=128)
    rng = random.Random(2)
    current = {task: f"{task}1" for task in ("yes", "no", "maybe", "never")}
    is_over = False
    num_answers = 0

    async def traffic(engine: NativeEngine) -> None:
        nonlocal num_answers
        while not is_over:
            asked = request("r", current[rng.choice(list(current))], max_tokens=rng.randint(1, 6))
            assert await tokens_of(engine, asked) == expected_answer(asked)
            num_answers += 1

    async with running(runner, host_adapter_mib=3) as engine:
        tasks = [asyncio.create_task(traffic(engine)) for _ in range(6)]
        for _ in range(1000):
            task = rng.choice(list(current))
            match rng.choice(["load", "unload", "swap"]):
                case "load":
                    await engine.load(handle(current[task]))
                case "unload":
                    await engine.unload(f"digest-{current[task]}")
                case "swap":
                    current[task] = f"{task}{rng.randint(1, 5)}"
                    await engine.load(handle(current[task]))
        is_over = True
        await asyncio.gather(*tasks)
    assert num_answers > 100


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), has_cache=st.booleans())
def test_answers_are_exact_under_preemption_shared_prompts_pieces_and_cancellation(seed: int, has_cache: bool) -> None:
    rng = random.Random(seed)
    prompts = ["".join(rng.choice("ab") for _ in range(20)) for _ in range(2)]
    runner = FakeRunner(num_slots=rng.randint(1, 3), num_blocks=rng.randint(16, 30))

    async def one(engine: NativeEngine, asked: GenerateRequest, num_events: int | None) -> None:
        await asyncio.sleep(rng.random() * 0.01)
        tokens: list[int] = []
        async with aclosing(engine.generate(asked)) as events:
            async for event in events:
                if isinstance(event, TokenEvent):
                    tokens.append(event.token_id)
                if len(tokens) == num_events:
                    break
        assert tokens == expected_answer(asked)[: len(tokens)]
        assert len(tokens) == (num_events or asked.sampling.max_tokens)

    async def everything() -> None:
        limits = {"max_step_tokens": rng.randint(2, 24), "max_sequences": rng.randint(1, 8)}
        async with running(runner, prefix_cache=has_cache, **limits) as engine, asyncio.timeout(30):
            await asyncio.gather(
                *(
                    one(
                        engine,
                        replace(
                            request(
                                f"{idx}",
                                rng.choice([None, "a", "b", "c"]),
                                prompt=rng.choice(prompts)[: rng.randint(1, 20)] + rng.choice(["", "c", "dd"]),
                                max_tokens=rng.randint(5, 30),
                            ),
                            tenant=rng.choice(["one", "two"]),
                            priority=rng.randint(0, 2),
                        ),
                        rng.choice([None, None, 1, 4]),
                    )
                    for idx in range(16)
                )
            )

    asyncio.run(everything())
