"""Through the whole engine, every answer is PEFT's with that adapter alone, and no schedule changes a bit of it.

Schedules differ in the order and the times of arrival, in slots, blocks, pieces of prompts and reuse of blocks.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adapterhub.base.identity import Base
from adapterhub.base.loading import load_model, load_tokenizer
from server.engine.engine import NativeEngine
from server.engine.runner import Runner
from server.engine.sequence import Limits
from server.engine.types import (
    AdapterHandle,
    AdapterPart,
    Event,
    FinishEvent,
    GenerateRequest,
    SamplingParams,
    TokenEvent,
)
from tests.support.adapters import open_with_peft, write_adapter
from tests.support.engines import collect
from tests.support.native import require_library
from tests.support.rows import prompt
from tests.support.tiny_models import build_base

SPECS: dict[str, dict[str, Any]] = {
    "lora4": {"method": "lora", "rank": 4},
    "lora64": {"method": "lora", "rank": 64, "lora_alpha": 16, "seed": 1},
    "rslora": {"method": "lora", "rank": 7, "use_rslora": True, "rank_pattern": {"q_proj": 3}, "seed": 2},
    "queries": {"method": "lora", "rank": 5, "target_modules": ["q_proj"], "seed": 3},
    "dora": {"method": "dora", "rank": 16, "seed": 4},
    "ia3": {"method": "ia3", "seed": 5},
    "adalora": {"method": "adalora", "rank": 12, "pruned": True, "seed": 6},
    "vera": {"method": "vera", "rank": 33, "seed": 7},
}
MIX = {"lora4": 0.7, "adalora": -0.4, "vera": 0.5}
BOUND = 1e-4
BLOCK_SIZE = 4


@dataclass(frozen=True)
class Schedule:
    """How the same requests are run. within_s: they arrive at random times, this long at most after the first."""

    seed: int
    num_slots: int = 3
    num_blocks: int = 1500
    within_s: float = 0.0
    limits: Mapping[str, Any] = field(default_factory=dict)


ALONE = Schedule(0, num_slots=1, limits={"max_sequences": 1, "max_step_tokens": 512, "prefix_cache": False})
PRESSED = Schedule(1, num_slots=4, num_blocks=42, limits={"max_step_tokens": 11, "host_adapter_mib": 0})
SCHEDULES = (
    PRESSED,
    Schedule(2, num_slots=2, num_blocks=40, limits={"max_step_tokens": 16, "max_sequences": 8}),
    Schedule(3, num_slots=9, num_blocks=60, limits={"max_step_tokens": 200, "prefix_cache": False}),
    Schedule(4, num_slots=9, limits={"max_step_tokens": 4096, "max_sequences": 64, "prefix_cache": False}),
    Schedule(5, num_slots=9, limits={"max_step_tokens": 64}),
    Schedule(6, within_s=0.5, limits={"max_step_tokens": 7, "max_sequences": 6}),
    Schedule(7, num_slots=1, within_s=0.2, limits={"max_step_tokens": 37}),
)
Score = tuple[int, str, str | None, tuple[tuple[int, str], ...]]


class CountingRunner(Runner):
    """Counts the tokens it computes and the rows that are neither whole prompts nor single tokens."""

    num_computed = 0
    num_pieces = 0

    def step(self, rows, *, epoch):
        self.num_computed += sum(len(row.token_ids) for row in rows)
        self.num_pieces += sum(len(row.token_ids) > 1 and row.start > 0 for row in rows)
        return super().step(rows, epoch=epoch)


@dataclass(frozen=True)
class World:
    """A base, the views of its adapters, and the adapters as requests name them: None for the base, and a mix."""

    base: Base
    views: dict[str, Path]
    handles: dict[str | None, AdapterHandle | None]

    @classmethod
    def build(cls, folder: Path, family: str) -> World:
        base = build_base(folder / "base", family)
        views = {name: write_adapter(folder / name, base, as_view=True, **spec) for name, spec in SPECS.items()}
        handles: dict[str | None, AdapterHandle | None] = {
            name: AdapterHandle.alone(f"digest-{name}", lambda view=view: view, name) for name, view in views.items()
        }
        parts = [AdapterPart(f"digest-{one}", one, weight, lambda one=one: views[one]) for one, weight in MIX.items()]
        return cls(base, views, handles | {None: None, "mix": AdapterHandle.mixed(parts)})

    def model(self, name: str | None) -> nn.Module:
        """What the answers with one adapter must equal: PEFT with it alone, or the base plus what PEFT would add."""
        model = load_model(self.base)
        if name in self.views:
            return open_with_peft(model, self.views[name])
        for member, weight in MIX.items() if name == "mix" else ():
            peft = open_with_peft(load_model(self.base), self.views[member])
            for path, layer in peft.named_modules():
                if hasattr(layer, "get_delta_weight"):
                    target = model.get_submodule(path.removeprefix("base_model.model."))
                    target.weight.data += weight * layer.get_delta_weight("default").detach()
        return model

    def requests(self) -> dict[str, GenerateRequest]:
        """Per adapter a prompt, one that goes on after the same beginning, a short and a long one."""
        beginning = prompt(30, seed=50)
        result = {}
        for number, (name, handle) in enumerate(self.handles.items()):
            prompts = (
                beginning[: 30 - number],
                [*beginning[:21], *prompt(9 + number, seed=number)],
                prompt(2, seed=number),
                [*beginning, *prompt(80 + number, seed=20 + number)],
            )
            for idx, tokens in enumerate(prompts):
                result[f"{name}-{idx}"] = GenerateRequest(
                    request_id=f"{name}-{idx}",
                    prompt_token_ids=tuple(tokens),
                    adapter=handle,
                    sampling=SamplingParams(max_tokens=8 + 4 * idx + number % 4, logprobs=2),
                    tenant=f"tenant{number % 2}",
                    priority=number % 3,
                )
        return result


def bits(events: Sequence[Event]) -> list[Score]:
    """Tokens and the exact log probabilities of an answer."""
    assert isinstance(events[-1], FinishEvent), events[-1]
    return [
        (one.token_id, one.text, None, ())
        if one.logprob is None
        else (
            one.token_id,
            one.text,
            one.logprob.chosen.logprob.hex(),
            tuple((score.token_id, score.logprob.hex()) for score in one.logprob.top),
        )
        for one in events[:-1]
        if isinstance(one, TokenEvent)
    ]


@dataclass(frozen=True)
class Outcome:
    """Answers by request. num_recomputed: tokens computed again after preemption; num_pieces: rows that are pieces."""

    answers: dict[str, list[Event]]
    num_cached: int
    num_recomputed: int
    num_pieces: int


async def run_all(world: World, schedule: Schedule, *, compute: Any = "float32") -> Outcome:
    runner = CountingRunner(
        load_model(world.base),
        world.base,
        num_slots=schedule.num_slots,
        num_blocks=schedule.num_blocks,
        block_size=BLOCK_SIZE,
        compute=compute,
    )
    engine = NativeEngine(runner, load_tokenizer(world.base), world.base, limits=Limits(**schedule.limits))
    rng = random.Random(schedule.seed)

    async def one(asked: GenerateRequest) -> tuple[str, list[Event]]:
        await asyncio.sleep(rng.random() * schedule.within_s)
        return asked.request_id, await collect(engine, asked)

    requests = list(world.requests().values())
    rng.shuffle(requests)
    await engine.start()
    try:
        async with asyncio.timeout(60):
            answers = dict(await asyncio.gather(*map(one, requests)))
        engine.check_integrity()
    finally:
        await engine.stop()
    ends = [end for events in answers.values() for end in events if isinstance(end, FinishEvent)]
    assert len(ends) == len(answers)
    needed = sum(end.num_prompt_tokens + end.num_completion_tokens - 1 - end.num_cached_tokens for end in ends)
    num_cached = engine.status().num_cached_prompt_tokens
    return Outcome(answers, num_cached, runner.num_computed - needed, runner.num_pieces)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World.build(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def alone(world: World) -> Outcome:
    require_library()
    return asyncio.run(run_all(world, ALONE))


def test_each_answer_of_the_engine_equals_peft_with_that_adapter_alone(world: World, alone: Outcome) -> None:
    requests = world.requests()
    models = {name: world.model(name) for name in world.handles}
    for request_id, events in alone.answers.items():
        tokens = [event for event in events if isinstance(event, TokenEvent)]
        asked = [*requests[request_id].prompt_token_ids, *(one.token_id for one in tokens)]
        with torch.no_grad():
            logits = models[_name(request_id)](input_ids=torch.tensor([asked[:-1]])).logits[0, -len(tokens) :]
        for one, row in zip(tokens, logits.float().log_softmax(dim=-1), strict=True):
            assert one.token_id == int(row.argmax()), request_id
            if one.logprob is not None:
                for score in (one.logprob.chosen, *one.logprob.top):
                    assert score.logprob == pytest.approx(row[score.token_id].item(), abs=BOUND), request_id
    assert len({tuple(bits(events)) for events in alone.answers.values()}) == len(alone.answers)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda one: f"seed{one.seed}")
async def test_no_schedule_changes_a_bit_of_any_answer(world: World, alone: Outcome, schedule: Schedule) -> None:
    found = await run_all(world, schedule)
    has_cache = schedule.limits.get("prefix_cache", True)
    assert (found.num_cached > 50) == has_cache
    assert (found.num_recomputed > 0) == (schedule.num_blocks < 100)
    assert found.num_pieces > 0 or schedule.limits["max_step_tokens"] > 1000
    differing = [name for name, events in found.answers.items() if bits(events) != bits(alone.answers[name])]
    assert differing == []


@pytest.mark.parametrize(("family", "compute"), [("mistral", "float32"), ("qwen2", "int8"), ("gemma2", "float32")])
async def test_no_schedule_changes_a_bit_with_other_models_and_products(
    tmp_path: Path, family: str, compute: str
) -> None:
    require_library()
    world = World.build(tmp_path, family)
    expected = await run_all(world, ALONE, compute=compute)
    found = await run_all(world, PRESSED, compute=compute)
    assert found.num_cached > 50
    assert found.num_recomputed > 0
    differing = [name for name, events in found.answers.items() if bits(events) != bits(expected.answers[name])]
    assert differing == []


def _name(request_id: str) -> str | None:
    name = request_id.rpartition("-")[0]
    return None if name == "None" else name
