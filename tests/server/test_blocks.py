"""Blocks are given out whole, once, and come back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub.errors import EngineStateError
from server.engine.blocks import BlockPool


def test_blocks_are_given_completely_or_not_at_all() -> None:
    pool = BlockPool(4, block_size=16)
    first = pool.allocate(3)
    assert first is not None
    assert pool.allocate(2) is None
    assert pool.num_free == 1
    pool.free(first)
    assert pool.num_free == 4
    pool.check_integrity([])


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (1, 1), (16, 1), (17, 2), (160, 10)])
def test_the_number_of_blocks_is_rounded_up(num_tokens: int, num_blocks: int) -> None:
    assert BlockPool(1, block_size=16).num_needed(num_tokens) == num_blocks


def test_giving_back_what_is_not_in_use_is_refused() -> None:
    pool = BlockPool(2, block_size=16)
    taken = pool.allocate(1)
    assert taken is not None
    pool.free(taken)
    with pytest.raises(EngineStateError, match=f"Block {taken[0]} is given back but not in use"):
        pool.free(taken)


def test_a_leak_and_a_double_use_are_found() -> None:
    pool = BlockPool(3, block_size=16)
    taken = pool.allocate(2)
    assert taken is not None
    pool.check_integrity(taken)
    with pytest.raises(EngineStateError, match=r"disagree about blocks \[0, 1\]; 0 are in use"):
        pool.check_integrity([])
    with pytest.raises(EngineStateError, match="disagree"):
        pool.check_integrity([*taken, taken[0]])


@given(st.lists(st.integers(0, 6), max_size=40))
def test_no_block_is_ever_held_twice(sizes: list[int]) -> None:
    pool = BlockPool(10, block_size=4)
    held: list[list[int]] = []
    for size in sizes:
        taken = pool.allocate(size)
        if taken is None:
            pool.free(held.pop(0))
        else:
            held.append(taken)
        pool.check_integrity([block for blocks in held for block in blocks])
