"""With a real model: a request that cannot be answered ends once and clearly, and nobody else notices."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapterhub.base.identity import Base
from adapterhub.base.loading import load_model, load_tokenizer
from adapterhub.errors import AdapterHubError
from server.engine.engine import NativeEngine
from server.engine.runner import Runner
from server.engine.sequence import Limits
from server.engine.types import (
    AdapterHandle,
    ErrorEvent,
    Event,
    FinishEvent,
    GenerateRequest,
    OutputRule,
    SamplingParams,
    TokenEvent,
)
from tests.support.adapters import write_adapter
from tests.support.engines import BASE, TOKENIZER, collect, request, until
from tests.support.fake_runner import FakeRunner
from tests.support.rows import prompt
from tests.support.tiny_models import build_base

NUM_BLOCKS, BLOCK_SIZE, NUM_SLOTS = 32, 4, 2
METHODS = ("lora", "dora", "ia3")


class Ward:
    """A base, healthy adapters and sick ones.

    release: lets the loads that hang go on; is_deleted: lets the load of the deleted adapter begin.
    """

    def __init__(self, folder: Path) -> None:
        self.base = build_base(folder / "base")
        self.release, self.is_deleted = threading.Event(), threading.Event()
        self.views = {
            name: write_adapter(folder / name, self.base, method=name, rank=5, as_view=True) for name in METHODS
        }
        for name, spoil in {"nan": torch.nan, "infinite": torch.inf}.items():
            self.views[name] = write_adapter(folder / name, self.base, method="lora", as_view=True)
            path = self.views[name] / "adapter_model.safetensors"
            tensors = load_file(path)
            next(iter(tensors.values()))[0, 0] = spoil
            save_file(tensors, path, {"format": "pt"})
        self.views["loud"] = write_adapter(folder / "loud", self.base, method="lora", strength=1e25, as_view=True)
        self.views["deleted"] = write_adapter(folder / "deleted", self.base, method="lora", as_view=True)

    def request(self, name: str | None, *, num_prompt: int = 18, max_tokens: int = 10, rule: OutputRule | None = None):
        return GenerateRequest(
            request_id=f"{name}",
            prompt_token_ids=tuple(prompt(num_prompt, seed=len(name or ""))),
            adapter=None if name is None else AdapterHandle.alone(f"digest-{name}", self._opener(name), name),
            sampling=SamplingParams(max_tokens=max_tokens, logprobs=1, output=rule),
        )

    def _opener(self, name: str) -> Callable[[], Path]:
        def open_view() -> Path:
            if name.startswith("stuck"):
                assert self.release.wait(30)
            if name == "deleted":
                assert self.is_deleted.wait(30)
            if name == "huge":
                raise MemoryError("no memory for 80 GiB")
            return self.views.get(name, self.views["lora"])

        return open_view

    def sick(self) -> dict[str, tuple[GenerateRequest, str]]:
        """Requests that cannot be answered, with what their error says."""
        context = NUM_BLOCKS * BLOCK_SIZE
        empty = OutputRule("regex", r"a[^\s\S]")
        impossible = OutputRule("json_schema", '{"type": "integer", "minimum": 3, "maximum": 2}')
        return {
            "too long": (self.request("lora", num_prompt=context), f"the context has {context}"),
            "no tokens": (self.request("lora", num_prompt=0), "has a prompt of 0 tokens"),
            "no value": (self.request("dora", rule=impossible), "schema cannot be used"),
            "no text": (self.request("ia3", rule=empty), "expression"),
            "nan": (self.request("nan"), "values are NaN or infinite"),
            "infinite": (self.request("infinite"), "values are NaN or infinite"),
            "loud": (self.request("loud"), "not finite with adapter 'loud'"),
            "huge": (self.request("huge"), "Adapter 'huge' cannot be loaded: no memory for 80 GiB."),
            "stuck1": (self.request("stuck1"), "it takes longer than 0.5 s"),
            "stuck2": (self.request("stuck2"), "it takes longer than 0.5 s"),
            "deleted": (self.request("deleted"), "Adapter 'deleted' cannot be loaded"),
        }


@pytest.fixture(scope="module")
def base_ward(tmp_path_factory: pytest.TempPathFactory) -> Ward:
    return Ward(tmp_path_factory.mktemp("ward"))


@asynccontextmanager
async def running(ward: Ward) -> AsyncIterator[NativeEngine]:
    base: Base = ward.base
    runner = Runner(load_model(base), base, num_slots=NUM_SLOTS, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
    limits = Limits(load_timeout_s=0.5, max_step_tokens=16, max_sequences=6)
    engine = NativeEngine(runner, load_tokenizer(base), base, limits=limits)
    await engine.start()
    try:
        yield engine
    finally:
        ward.release.set()
        await engine.stop()


async def outcome(engine: NativeEngine, asked: GenerateRequest) -> list[Event | AdapterHubError]:
    """Return the events of a request, and the error that it raised instead of further events."""
    events: list[Event | AdapterHubError] = []
    try:
        async for event in engine.generate(asked):
            events.append(event)  # What came before an error counts too.
    except AdapterHubError as error:
        events.append(error)
    return events


async def test_every_way_to_fail_is_one_terminal_event_and_nobody_else_notices(base_ward: Ward) -> None:
    ward = base_ward
    healthy = [ward.request(name, max_tokens=30) for name in (None, *METHODS)]
    async with running(ward) as engine, asyncio.timeout(30):
        alone = [_scores(await collect(engine, one)) for one in healthy]
        sick = ward.sick()
        failing = {name: asyncio.create_task(outcome(engine, asked)) for name, (asked, _) in sick.items()}
        await until(lambda: engine.status().num_waiting > 0)
        shutil.rmtree(ward.views["deleted"])
        ward.is_deleted.set()
        while not all(task.done() for task in failing.values()):
            answers = await asyncio.gather(*(collect(engine, one) for one in healthy))
            assert [_scores(events) for events in answers] == alone
        for name, task in failing.items():
            *before, end = task.result()
            assert all(isinstance(event, TokenEvent) for event in before), name
            assert isinstance(end, ErrorEvent | AdapterHubError), (name, end)
            error = end.error if isinstance(end, ErrorEvent) else end
            assert sick[name][1] in str(error), name
        await _assert_nothing_is_held(engine, ward)


async def _assert_nothing_is_held(engine: NativeEngine, ward: Ward) -> None:
    """Nothing runs or waits; one request gets every block; every adapter can go, so no slot has a user."""
    await until(lambda: engine.status().num_running == engine.status().num_waiting == 0)
    engine.check_integrity()
    num_prompt = NUM_BLOCKS * BLOCK_SIZE - 3
    events = await collect(engine, ward.request(None, num_prompt=num_prompt, max_tokens=3))
    assert isinstance(events[-1], FinishEvent)
    assert [await engine.unload(digest) for digest in engine.resident()].count(False) == 0
    assert engine.resident() == []


async def test_a_mistake_in_the_loop_leaves_no_sender_without_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> bool:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("server.engine.residency.Residency.unload", broken)
    runner = FakeRunner()
    engine = NativeEngine(runner, TOKENIZER, BASE)
    await engine.start()
    async with asyncio.timeout(10):
        runner.gate.clear()
        running = asyncio.create_task(collect(engine, request("running")))
        await until(lambda: engine.status().num_running == 1)
        unload = asyncio.create_task(engine.unload("digest"))
        await asyncio.sleep(0)  # The request comes after it, and both wait for the step to end.
        waiting = asyncio.create_task(collect(engine, request("waiting")))
        await until(lambda: engine.status().num_waiting == 1)
        runner.gate.set()
        assert not await unload
        for events in await asyncio.gather(running, waiting):
            assert isinstance(events[-1], ErrorEvent)
            assert str(events[-1].error) == "The engine stopped: oops. Restart the server and report its log."
    await engine.stop()


def _scores(events: list[Event]) -> list[tuple[int, object]]:
    assert isinstance(events[-1], FinishEvent), events[-1]
    return [(one.token_id, one.logprob) for one in events[:-1] if isinstance(one, TokenEvent)]
