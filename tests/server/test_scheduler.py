"""What runs when: batches, budgets, slots in order, preemption, cancellation."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.blocks import BlockPool
from server.engine.scheduler import Scheduler
from server.engine.sequence import Limits, Sequence, StepPlan
from server.engine.slots import BASE_SLOT, SlotTable


class Anything:
    """A host that has every adapter."""

    def __contains__(self, _: object) -> bool:
        return True


EVERYTHING = Anything()


class Bench:
    """A scheduler and the bookkeeping of a step loop without a model."""

    def __init__(self, *, slots: int = 2, blocks: int = 64, block_size: int = 4, **limits) -> None:
        self.slots, self.blocks = SlotTable(slots), BlockPool(blocks, block_size=block_size)
        self.scheduler = Scheduler(self.slots, self.blocks, Limits(**limits))
        self.sequences: dict[str, Sequence] = {}

    def add(self, name: str, *, tokens: int = 3, digest: str | None = None, **options) -> Sequence:
        sequence = self.sequences[name] = Sequence(name, digest, list(range(tokens)), **options)
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
    bench = Bench(slots=1, lead_tokens=0)
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


def test_other_slots_take_more_sequences_while_one_waits_for_a_slot() -> None:
    bench = Bench(slots=2)
    short, long = bench.add("short", digest="a", max_tokens=5), bench.add("long", digest="b", max_tokens=50)
    bench.step()
    waiting = bench.add("waiting", digest="c", priority=-1)
    bench.add("a2", digest="a")
    bench.add("b2", digest="b")
    assert _names(bench.step()) == ["short", "long", "b2"]  # The slot of `short` is free soonest and is kept.
    bench.scheduler.finish(short)
    assert "waiting" in _names(bench.step())
    assert waiting.slot == 0
    assert "a2" not in _names(bench.step())
    assert long.slot == 1


def test_adapters_in_turn_on_one_slot_each_run_after_the_other_has_drained() -> None:
    bench = Bench(slots=1, max_sequences=4, lead_tokens=0)
    for idx in range(12):
        bench.add(f"{idx}", digest="b" if idx == 3 else "a")
    order = []
    while bench.scheduler.num_waiting or bench.scheduler.num_running:
        for row in bench.step().rows:
            order.append(row.sequence.request_id)
            bench.scheduler.finish(row.sequence)
    assert order == ["0", "3", "1", "2", *(str(idx) for idx in range(4, 12))]


def test_an_adapter_in_a_slot_may_lead_by_a_number_of_tokens() -> None:
    bench = Bench(slots=1, max_sequences=1, lead_tokens=20)
    for idx in range(12):
        bench.add(f"{idx}", digest="b" if idx == 3 else "a")
    order = []
    while bench.scheduler.num_waiting or bench.scheduler.num_running:
        for row in bench.step().rows:
            order.append(row.sequence.request_id)
            bench.scheduler.finish(row.sequence)
    # Each takes 3 prompt tokens and an answer of 1, which counts twice: after four, `a` leads by 20.
    assert order == ["0", "1", "2", "4", "3", *(str(idx) for idx in range(5, 12))]


def test_a_slot_is_filled_ahead_for_one_that_has_no_row_yet() -> None:
    bench = Bench(slots=2, max_sequences=1)
    first = bench.add("first", digest="a")
    bench.add("next", digest="b")
    plan = bench.step()
    assert _names(plan) == ["first"]
    assert plan.writes == ((0, "a"), (1, "b"))
    bench.scheduler.finish(first)
    plan = bench.step()
    assert _names(plan) == ["next"]
    assert plan.writes == ()


def test_no_slot_is_filled_ahead_at_the_cost_of_one_that_is_asked_for() -> None:
    bench = Bench(slots=1, max_sequences=1)
    first = bench.add("first", digest="a")
    bench.step()
    bench.scheduler.finish(first)
    bench.add("base")
    for name in ("b", "a"):
        bench.add(f"again {name}", digest=name)
    plan = bench.step()
    assert _names(plan) == ["base"]
    assert plan.writes == ()


def test_an_adapter_that_is_asked_for_keeps_its_slot_if_another_can_give_way() -> None:
    bench = Bench(slots=2, max_sequences=1)
    for name, digest in (("1", "often"), ("2", "often"), ("3", "asked")):
        sequence = bench.add(name, digest=digest)
        bench.step()
        bench.scheduler.finish(sequence)
    bench.add("next", digest="new", priority=-1)
    bench.add("last", digest="asked")
    bench.step()
    assert sorted(bench.slots.digests()) == ["asked", "new"]


def test_slow_loads_do_not_keep_others_from_being_asked_for() -> None:
    bench = Bench(slots=2)
    for name in "abcd":
        bench.add(name, digest=name)
    assert bench.step(loaded=()).missing == ("a", "b")
    assert bench.scheduler.schedule(loaded=(), slow={"a", "b"}).missing == ("a", "b", "c", "d")


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


@pytest.mark.parametrize("has_cache", [True, False])
def test_the_latest_sequence_gives_way_when_blocks_run_out_and_comes_back(has_cache: bool) -> None:
    bench = Bench(blocks=4, prefix_cache=has_cache)
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
    num_kept = 0 if not has_cache else 4  # One full block of what it had computed.
    assert plan.rows[0].start == num_kept
    assert plan.rows[0].token_ids == tuple(new.token_ids[num_kept:-1])


def test_the_least_urgent_sequence_gives_way_before_the_latest() -> None:
    bench = Bench(blocks=6, prefix_cache=False)
    least = bench.add("least", tokens=7, priority=1)
    bench.step()
    others = [bench.add(name, tokens=7) for name in ("x", "y")]
    bench.step()
    assert all(one.block_ids for one in (least, *others))
    while least.block_ids:
        assert all(one.block_ids for one in others)
        bench.step()
    assert all(one.block_ids for one in others)


def test_a_lower_priority_number_runs_first_and_age_makes_up_for_it() -> None:
    bench = Bench(max_sequences=1, ageing_steps=3)
    running = bench.add("running")
    bench.step()
    bench.add("patient", priority=2)
    for _ in range(5):
        bench.step()
    bench.add("urgent", priority=0)
    bench.scheduler.finish(running)
    assert _names(bench.step()) == ["urgent"]
    bench.scheduler.finish(bench.sequences["urgent"])
    bench.add("late", priority=0)
    assert _names(bench.step()) == ["patient"]  # Two levels in six steps.


def test_answers_to_one_prompt_compute_it_once() -> None:
    bench = Bench(max_sequences=8, block_size=4)
    for idx in range(4):
        bench.add(f"{idx}", tokens=19)
    assert _sizes(bench.step()) == [("0", 19)]
    assert _sizes(bench.step()) == [("0", 1), *((f"{idx}", 3) for idx in (1, 2, 3))]
    assert bench.scheduler.num_cached_tokens == 3 * 16


def test_a_sequence_whose_prompt_another_computes_goes_on_when_that_one_is_gone() -> None:
    bench = Bench(max_step_tokens=8)
    first = bench.add("first", tokens=20)
    bench.add("second", tokens=20)
    assert _sizes(bench.step()) == [("first", 8)]
    bench.scheduler.finish(first)
    plan = bench.step()
    assert _sizes(plan) == [("second", 8)]
    assert plan.rows[0].start == 8


def test_a_short_common_beginning_is_not_waited_for() -> None:
    bench = Bench()
    bench.add("first", tokens=4)
    other = bench.add("other", tokens=20)
    other.token_ids[5:] = range(100, 115)
    assert _names(bench.step()) == ["first", "other"]


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
