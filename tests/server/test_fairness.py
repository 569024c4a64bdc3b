"""Everyone who waits is served: bounds on waiting, and on how much more one gets than another.

The bounds are in the tokens of the virtual counters and in steps, for traffic that never pauses.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.blocks import BlockPool
from server.engine.fairness import FairQueue
from server.engine.scheduler import Scheduler
from server.engine.sequence import Limits, Sequence
from server.engine.slots import SlotTable

MAX_PROMPT, MAX_ANSWER = 9, 7
# What a step's rows can still be served once they run: prompts count once, answers twice.
COST = MAX_PROMPT + 2 * MAX_ANSWER


class Everything:
    """A host that has every adapter."""

    def __contains__(self, _: object) -> bool:
        return True


@dataclass
class Flood:
    """Traffic that keeps `depth` sequences of every (tenant, adapter) waiting, and what each was served."""

    rng: random.Random
    clients: list[tuple[str, str | None]]
    slots: int = 2
    blocks: int = 60
    limits: Limits = field(default_factory=Limits)
    depth: int = 2
    num_steps: int = 0

    def __post_init__(self) -> None:
        self.table = SlotTable(self.slots)
        self.scheduler = Scheduler(self.table, BlockPool(self.blocks, block_size=4), self.limits)
        self.left: dict[Sequence, int] = {}
        self.served: Counter[tuple[str, str | None]] = Counter()
        self.started: dict[str, int] = {}
        self._number = 0

    def add(self, tenant: str, digest: str | None, *, priority: int = 0) -> Sequence:
        self._number += 1
        prompt = [self.rng.randrange(3) for _ in range(self.rng.randint(1, MAX_PROMPT))]
        length = self.rng.randint(1, MAX_ANSWER)
        sequence = Sequence(
            f"{self._number}", digest, prompt, tenant, priority=priority, max_tokens=len(prompt) + length
        )
        self.left[sequence] = length
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> None:
        waiting = Counter((one.tenant, one.digest) for one in self.left if not one.block_ids)
        for client in self.clients:
            for _ in range(self.depth - waiting[client]):
                self.add(*client)
        new = [one for one in self.left if not one.block_ids and one.slot is None]
        plan = self.scheduler.schedule(loaded=Everything())
        self.num_steps += 1
        for one in new:
            if one.block_ids:
                self.started[one.request_id] = self.num_steps
                self.served[one.tenant, one.digest] += one.num_left
        for row in plan.rows:
            self.scheduler.advance(row, 3 if row.is_sampled else None)
            self.left[row.sequence] -= row.is_sampled
            self.served[row.sequence.tenant, row.sequence.digest] += 2 * row.is_sampled
        for one in [one for one, number in self.left.items() if number <= 0]:
            self.scheduler.finish(one)
            del self.left[one]
        self.scheduler.check_integrity()

    def steps_until_started(self, sequence: Sequence, *, most: int) -> int:
        begin = self.num_steps
        while sequence.request_id not in self.started:
            self.step()
            assert self.num_steps - begin <= most, f"still waiting after {most} steps"
        return self.started[sequence.request_id] - begin


def _of_tenant(flood: Flood, tenant: str) -> int:
    return sum(tokens for (one, _), tokens in flood.served.items() if one == tenant)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), lead=st.sampled_from([0, 40]), rows=st.integers(1, 6))
def test_tenants_that_always_wait_are_served_alike_however_many_adapters_they_use(
    seed: int, lead: int, rows: int
) -> None:
    clients = [("one", None), ("two", "a"), ("two", "b"), ("two", None), ("three", "a")]
    flood = Flood(
        random.Random(seed),
        clients,
        slots=2,
        limits=Limits(max_sequences=rows, max_step_tokens=20, lead_tokens=lead),
    )
    bound = 2 * (lead + MAX_PROMPT + rows * COST)
    for _ in range(400):
        flood.step()
        tenants = [_of_tenant(flood, one) for one in ("one", "two", "three")]
        assert max(tenants) - min(tenants) <= bound
    adapters = [flood.served[client] for client in clients if client[0] == "two"]
    assert max(adapters) - min(adapters) <= bound


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    slots=st.integers(1, 3),
    rows=st.integers(1, 5),
    lead=st.sampled_from([0, 30]),
    blocks=st.sampled_from([8, 60]),
    priority=st.integers(0, 2),
)
def test_the_wait_of_every_request_is_bounded_whatever_keeps_arriving(
    seed: int, slots: int, rows: int, lead: int, blocks: int, priority: int
) -> None:
    rng = random.Random(seed)
    clients = [(tenant, digest) for tenant in ("one", "two") for digest in ("a", "b", "c", None)]
    limits = Limits(max_sequences=rows, max_step_tokens=rng.randint(4, 20), lead_tokens=lead, ageing_steps=10)
    flood = Flood(rng, clients, slots=slots, blocks=blocks, limits=limits)
    for _ in range(60):
        flood.step()
    new = flood.add(rng.choice(["one", "new"]), rng.choice(["d", None]), priority=priority)
    # It grows as urgent as the others. From then on each of the others is served at most `spread` before it, at one
    # token a step or more, and each change of a slot waits for the rows that use it.
    spread = 2 * (lead + MAX_PROMPT + rows * COST)
    num_others, drain = len(clients) + 1, rows * (MAX_PROMPT + MAX_ANSWER)
    flood.steps_until_started(new, most=priority * limits.ageing_steps + num_others * (spread + drain))


@pytest.mark.parametrize("lead", [0, 30, 200])
def test_one_slot_and_an_endless_stream_for_another_adapter(lead: int) -> None:
    """A, B, A, A, ...: B waits for the lead of A and for the rows that run, and no longer."""
    flood = Flood(random.Random(1), [("", "a")], slots=1, depth=4, limits=Limits(max_sequences=4, lead_tokens=lead))
    for _ in range(50):
        flood.step()
    before = flood.served["", "a"]
    new = flood.add("", "b")
    flood.steps_until_started(new, most=1000)
    assert flood.served["", "a"] - before <= lead + 4 * COST + COST
    assert flood.table.find("b") is not None


def test_one_tenant_with_many_requests_does_not_delay_one_with_few() -> None:
    flood = Flood(random.Random(2), [("crowd", None)], depth=200, limits=Limits(max_sequences=4))
    for _ in range(100):
        flood.step()
    waits = [flood.steps_until_started(flood.add("alone", None), most=MAX_ANSWER + 1) for _ in range(10)]
    assert max(waits) <= MAX_ANSWER + 1  # Until one of the rows that run is free.


def test_who_pauses_saves_nothing_up() -> None:
    queue = FairQueue(lead_tokens=0, ageing_steps=64)

    def add(tenant: str) -> Sequence:
        sequence = Sequence("", None, [1], tenant)
        queue.add(sequence)
        return sequence

    def serve(tenant: str, tokens: int) -> None:
        sequence = add(tenant)
        queue.remove(sequence)
        queue.charge(sequence, num_prompt=tokens)

    serve("early", 10)
    for _ in range(20):
        serve("busy", 100)
    add("busy")
    back = [add("early") for _ in range(2)]
    queue.charge(back[0], num_prompt=1)
    assert next(queue.in_order(frozenset())).tenant == "busy"


def test_counters_of_those_who_left_are_dropped() -> None:
    queue = FairQueue(lead_tokens=0, ageing_steps=64)
    for idx in range(5000):
        sequence = Sequence("", f"{idx}", [1], f"tenant{idx}")
        queue.add(sequence)
        queue.remove(sequence)
        queue.charge(sequence, num_prompt=5)
    assert queue.num_counters < 3000
