"""A native engine over the fake runner, requests for it, and the answers they must get."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

from adapterhub.base import Base
from adapterhub.base.prompts import text_token_ids
from server.engine.engine import NativeEngine
from server.engine.scheduler import Limits
from server.engine.types import (
    AdapterHandle,
    Engine,
    Event,
    FinishEvent,
    GenerateRequest,
    SamplingParams,
    TokenEvent,
)
from tests.support.fake_runner import FakeRunner, expected_token
from tests.support.tiny_models import byte_tokenizer

__all__ = ["BASE", "TOKENIZER", "collect", "expected_answer", "handle", "request", "running", "tokens_of", "until"]

TOKENIZER = byte_tokenizer()
BASE = Base("tiny", Path(), "none", "0" * 64, "1" * 64, 128, {})


def handle(name: str) -> AdapterHandle:
    return AdapterHandle.alone(f"digest-{name}", lambda: Path(name), f"{name}@v1")


def request(name: str, adapter: str | None = None, *, prompt: str = "hello", max_tokens: int = 8, **sampling):
    return GenerateRequest(
        request_id=name,
        prompt_token_ids=tuple(text_token_ids(TOKENIZER, prompt)),
        adapter=None if adapter is None else handle(adapter),
        sampling=SamplingParams(max_tokens=max_tokens, **sampling),
    )


def expected_answer(asked: GenerateRequest) -> list[int]:
    history = list(asked.prompt_token_ids)
    for _ in range(asked.sampling.max_tokens):
        history.append(expected_token(history, asked.adapter.parts[0].open_view().name if asked.adapter else ""))
    return history[len(asked.prompt_token_ids) :]


@asynccontextmanager
async def running(runner: FakeRunner, tokenizer: Any = TOKENIZER, **limits: float) -> AsyncIterator[NativeEngine]:
    engine = NativeEngine(runner, tokenizer, BASE, limits=Limits(**limits))
    await engine.start()
    try:
        yield engine
        await until(lambda: engine.status().num_running == 0)
        engine.check_integrity()
    finally:
        for gate in (runner.gate, *runner.load_gates.values()):
            gate.set()
        await engine.stop()


async def collect(engine: Engine, asked: GenerateRequest) -> list[Event]:
    async with aclosing(engine.generate(asked)) as events:
        return [event async for event in events]


async def tokens_of(engine: Engine, asked: GenerateRequest) -> list[int]:
    events = await collect(engine, asked)
    assert isinstance(events[-1], FinishEvent), events[-1]
    return [event.token_id for event in events if isinstance(event, TokenEvent)]


async def until(condition: Callable[[], object], timeout_s: float = 5) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.002)
