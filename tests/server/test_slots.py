"""A slot in use is never given away; among the others the one unused for longest is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub.errors import EngineStateError
from server.engine.slots import SlotTable


def test_a_resident_adapter_is_shared_by_its_users() -> None:
    slots = SlotTable(2)
    slot = slots.claim("a")
    assert slot is not None
    assert slots.acquire("a") == slot
    slots.check_integrity([slot, slot])
    slots.release(slot)
    slots.release(slot)
    assert slots.find("a") == slot
    slots.check_integrity([])


def test_a_slot_in_use_is_never_given_away() -> None:
    slots = SlotTable(1)
    slot = slots.claim("a")
    assert slot == 0
    assert slots.claim("b") is None
    assert slots.acquire("b") is None
    slots.release(0)
    assert slots.claim("b") == 0
    assert slots.find("a") is None
    assert slots.digests() == ["b"]


def test_the_slot_unused_for_longest_is_given_away() -> None:
    slots = SlotTable(3)
    for digest in "abc":
        slot = slots.claim(digest)
        assert slot is not None
        slots.release(slot)
    again = slots.acquire("a")
    assert again is not None
    slots.release(again)
    slots.claim("d")
    assert sorted(slots.digests()) == ["a", "c", "d"]


def test_a_slot_that_is_dear_to_fill_again_outlives_a_cheap_one_until_it_is_long_unused() -> None:
    slots = SlotTable(2)
    for digest, cost_s in (("dear", 0.05), ("cheap", 0.01)):
        slot = slots.claim(digest)
        assert slot is not None
        slots.note_cost(digest, cost_s=cost_s)
        slots.release(slot)
    seen = []
    for idx in range(8):
        slot = slots.claim(f"{idx}")
        assert slot is not None
        slots.release(slot)
        seen.append(slots.find("dear") is not None)
    assert slots.find("cheap") is None
    assert seen == sorted(seen, reverse=True)
    assert seen[0]
    assert not seen[-1]


def test_adapters_that_are_asked_for_do_not_give_way() -> None:
    slots = SlotTable(1)
    slots.claim("a")
    slots.release(0)
    assert slots.claim("b", keep={"a"}) is None
    assert slots.claim("b", keep={"c"}) == 0


def test_a_failed_write_leaves_an_empty_slot() -> None:
    slots = SlotTable(1)
    slots.claim("a")
    with pytest.raises(EngineStateError, match=r"Slot 0 is discarded but has 1 users\. Release it first\."):
        slots.discard(0)
    slots.release(0)
    slots.discard(0)
    assert slots.find("a") is None
    assert slots.claim("b") == 0


def test_mistakes_are_refused() -> None:
    slots = SlotTable(1)
    slots.claim("a")
    with pytest.raises(EngineStateError, match=r"Adapter 'a' has a slot already\. Acquire it instead\."):
        slots.claim("a")
    slots.release(0)
    with pytest.raises(EngineStateError, match=r"Slot 0 is released but has no user\."):
        slots.release(0)
    slots.acquire("a")
    with pytest.raises(EngineStateError, match=r"The slot table and its users disagree about slots \[0\]."):
        slots.check_integrity([])


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.booleans()), max_size=60))
def test_counts_and_holders_agree_after_any_use(moves: list[tuple[str, bool]]) -> None:
    slots, users = SlotTable(3), []
    for digest, is_release in moves:
        if is_release and users:
            slots.release(users.pop(0))
        else:
            slot = slots.acquire(digest)
            slot = slots.claim(digest) if slot is None else slot
            assert (slot is None) == (slots.find(digest) is None)
            if slot is None:
                assert len(set(users)) == 3
            else:
                users.append(slot)
        slots.check_integrity(users)
