"""What runs when: batches, budgets, slots in order, preemption, cancellation."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.blocks import BlockPool
from server.engine.scheduler import Limits, Scheduler, Sequence, StepPlan
from server.engine.slots import BASE_SLOT, SlotTable


class Anything:
    """A host that has every adapter."""

    def __contains__(self, _: object) -> bool:
        return True


EVERYTHING = Anything()


class Bench:
    """A scheduler and the bookkeeping of a step loop without a model."""

    def __init__(self, *, slots: int = 2, blocks: int = 64, **limits: int) -> None:
        self.slots, self.blocks = SlotTable(slots), BlockPool(blocks, block_size=4)
        self.scheduler = Scheduler(self.slots, self.blocks, Limits(**limits))

    def add(self, name: str, *, tokens: int = 3, digest: str | None = None) -> Sequence:
        sequence = Sequence(name, digest, list(range(tokens)))
        self.scheduler.add(sequence)
        return sequence

    def step(self, loaded=EVERYTHING) -> StepPlan:
        plan = self.scheduler.schedule(loaded=loaded)
        for row in plan.rows:
            assert len(row.sequence.block_ids) * 4 >= row.start + len(row.token_ids)
            self.scheduler.advance(row, 7 if row.is_sampled else None)
        self.scheduler.check_integrity()
        return plan


def _names(plan: StepPlan) -> list[str]:
    return [row.sequence.request_id for row in plan.rows]


def _sizes(plan: StepPlan) -> list[tuple[str, int]]:
    return [(row.sequence.request_id, len(row.token_ids)) for row in plan.rows]


def test_sequences_that_arrive_together_share_a_step_whatever_their_adapters() -> None:
    bench = Bench()
    for name, digest in (("x", None), ("y", "a"), ("z", "b"), ("w", "a")):
        bench.add(name, digest=digest)
    plan = bench.step()
    assert _names(plan) == ["x", "y", "z", "w"]
    assert plan.writes == ((0, "a"), (1, "b"))
    assert [row.sequence.slot for row in plan.rows] == [BASE_SLOT, 0, 1, 0]
    assert all(row.is_sampled and row.token_ids == (0, 1, 2) for row in plan.rows)
    assert bench.step().writes == ()


def test_a_long_prompt_is_cut_so_that_others_go_on_decoding() -> None:
    bench = Bench(max_step_tokens=8)
    bench.add("short")
    bench.step()
    long = bench.add("long", tokens=20)
    pieces = []
    while long.num_left > 1:
        plan = bench.step()
        assert _names(plan) == ["short", "long"]
        assert len(plan.rows[0].token_ids) == 1
        pieces.append(plan.rows[1].token_ids)
    assert [len(piece) for piece in pieces] == [7, 7, 6]
    assert [token for piece in pieces for token in piece] == list(range(20))


def test_prompts_are_served_in_order_of_arrival() -> None:
    bench = Bench(max_step_tokens=5)
    for name in "abc":
        bench.add(name, tokens=4)
    assert _sizes(bench.step()) == [("a", 4), ("b", 1)]
    assert _sizes(bench.step()) == [("a", 1), ("b", 3), ("c", 1)]


def test_no_more_sequences_run_than_allowed() -> None:
    bench = Bench(max_sequences=2)
    first = [bench.add(name) for name in "abc"]
    assert _names(bench.step()) == ["a", "b"]
    bench.scheduler.finish(first[0])
    assert _names(bench.step()) == ["b", "c"]


def test_a_sequence_waits_for_a_slot_and_no_later_adapter_passes_it() -> None:
    bench = Bench(slots=1)
    a1 = bench.add("a1", digest="a")
    bench.step()
    b1 = bench.add("b1", digest="b")
    a2 = bench.add("a2", digest="a")
    bench.add("base")
    assert _names(bench.step()) == ["a1", "base"]  # `base` needs no slot; `a2` would keep the slot from `b1`.
    bench.scheduler.finish(a1)
    plan = bench.step()
    assert "b1" in _names(plan)
    assert plan.writes == ((0, "b"),)
    assert "a2" not in _names(plan)
    bench.scheduler.finish(b1)
    assert "a2" in _names(bench.step())
    bench.scheduler.finish(a2)


def test_alternating_adapters_with_one_slot_never_starve_one() -> None:
    bench = Bench(slots=1, max_sequences=4)
    for idx in range(12):
        bench.add(f"{idx}", digest="b" if idx == 3 else "a")
    order = []
    while bench.scheduler.num_waiting or bench.scheduler.num_running:
        for row in bench.step().rows:
            order.append(row.sequence.request_id)
            bench.scheduler.finish(row.sequence)
    assert order == [str(idx) for idx in range(12)]


def test_an_adapter_that_is_still_loading_holds_nobody_up() -> None:
    bench = Bench()
    bench.add("slow", digest="s")
    bench.add("quick", digest="q")
    plan = bench.step(loaded={"q"})
    assert _names(plan) == ["quick"]
    assert plan.missing == ("s",)
    plan = bench.step(loaded={"q", "s"})
    assert _names(plan) == ["quick", "slow"]
    assert plan.missing == ()


def test_a_resident_adapter_needs_no_copy_on_the_host() -> None:
    bench = Bench()
    first = bench.add("one", digest="a")
    bench.step()
    bench.scheduler.finish(first)
    bench.add("two", digest="a")
    plan = bench.step(loaded=())
    assert _names(plan) == ["two"]
    assert plan.writes == ()


def test_the_latest_sequence_gives_way_when_blocks_run_out_and_comes_back() -> None:
    bench = Bench(blocks=4)
    old = bench.add("old", tokens=6)
    new = bench.add("new", tokens=6, digest="a")
    assert _names(bench.step()) == ["old", "new"]
    slot = new.slot
    while new.block_ids:
        assert len(old.token_ids) < 12
        plan = bench.step()
    assert _names(plan) == ["old"]
    assert new.num_computed == 0
    assert new.slot == slot  # It keeps its adapter.
    assert bench.scheduler.num_waiting == 1
    bench.scheduler.finish(old)
    plan = bench.step()
    assert _names(plan) == ["new"]
    assert plan.rows[0].token_ids == tuple(new.token_ids[:-1])


@pytest.mark.parametrize("num_steps", [0, 1, 2, 5])
def test_a_sequence_can_be_finished_at_any_step(num_steps: int) -> None:
    bench = Bench(max_step_tokens=4)
    sequence = bench.add("x", tokens=10, digest="a")
    for _ in range(num_steps):
        bench.step()
    bench.scheduler.finish(sequence)
    bench.scheduler.check_integrity()
    assert bench.blocks.num_free == bench.blocks.num_blocks
    assert bench.step().rows == ()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_every_sequence_ends_under_any_mix_of_load_and_cancellation(seed: int) -> None:
    rng = random.Random(seed)
    bench = Bench(slots=2, blocks=12, max_step_tokens=rng.randint(1, 20), max_sequences=rng.randint(1, 6))
    left = {
        bench.add(f"{idx}", tokens=rng.randint(1, 20), digest=rng.choice([None, "a", "b", "c", "d"])): rng.randint(
            1, 20
        )
        for idx in range(12)
    }
    for _ in range(5000):
        for row in bench.step().rows:
            left[row.sequence] -= row.is_sampled
        done = [one for one, tokens in left.items() if tokens <= 0 or rng.random() < 0.002]
        for sequence in done:
            bench.scheduler.finish(sequence)
            del left[sequence]
        if not left:
            break
    assert not left
    bench.scheduler.check_integrity()
    assert bench.blocks.num_free == 12
