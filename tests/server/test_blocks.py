"""Blocks are given out whole, once, and come back."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterhub.errors import EngineStateError
from server.engine.blocks import BlockPool
from tests.support.block_model import BlockModel


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


def _hashes(text: str) -> list[bytes]:
    """One hash per beginning, as a chain gives them."""
    return [text[: idx + 1].encode() for idx in range(len(text))]


def _fill(pool: BlockPool, text: str) -> list[int]:
    """Take a block per letter, register all and return them."""
    shared = pool.match(_hashes(text))
    blocks = pool.take(shared, num_new=len(text) - len(shared))
    assert blocks is not None
    for block, one in zip(blocks, _hashes(text), strict=True):
        pool.register(block, one)
    return blocks


def test_a_registered_beginning_is_shared_while_it_is_used_and_after() -> None:
    pool = BlockPool(6, block_size=4)
    first = _fill(pool, "abc")
    second = _fill(pool, "abd")
    assert second[:2] == first[:2]
    assert second[2] != first[2]
    assert pool.num_free == 2
    pool.check_integrity([*first, *second])
    pool.free(first)
    pool.free(second)
    assert pool.num_free == 6
    assert pool.match(_hashes("abc")) == first
    assert pool.match(_hashes("xbc")) == []


def test_of_free_registered_blocks_the_one_unused_for_longest_is_reclaimed_and_an_end_before_its_beginning() -> None:
    pool = BlockPool(5, block_size=4)
    for text in ("ab", "xyz"):
        pool.free(_fill(pool, text))
    pool.free(_fill(pool, "ab"))
    taken = pool.allocate(2)
    assert taken is not None
    assert len(pool.match(_hashes("xyz"))) == 1
    assert len(pool.match(_hashes("ab"))) == 2
    pool.check_integrity(taken)


def test_blocks_without_content_are_taken_before_registered_ones() -> None:
    pool = BlockPool(4, block_size=4)
    plain = pool.allocate(2)
    assert plain is not None
    pool.free(_fill(pool, "ab"))
    pool.free(plain)
    assert pool.allocate(2) is not None
    assert len(pool.match(_hashes("ab"))) == 2


def test_shared_blocks_that_nobody_uses_count_as_taken() -> None:
    pool = BlockPool(3, block_size=4)
    pool.free(_fill(pool, "ab"))
    shared = pool.match(_hashes("ab"))
    assert pool.take(shared, num_new=2) is None
    assert pool.num_free == 3
    assert pool.take(shared, num_new=1) is not None
    assert pool.num_free == 0


def test_equal_content_computed_twice_is_registered_once() -> None:
    pool = BlockPool(4, block_size=4)
    first, second = pool.allocate(1), pool.allocate(1)
    assert first is not None
    assert second is not None
    pool.register(first[0], b"x")
    pool.register(second[0], b"x")
    assert pool.match([b"x"]) == first
    assert pool.num_registered == 1
    pool.check_integrity([*first, *second])


def test_only_a_block_in_use_is_registered() -> None:
    pool = BlockPool(2, block_size=4)
    with pytest.raises(EngineStateError, match=r"Block 1 is registered but not in use\."):
        pool.register(1, b"x")


@settings(max_examples=200, deadline=None)
@given(
    moves=st.lists(st.tuples(st.text("ab", min_size=1, max_size=4), st.integers(0, 2), st.booleans()), max_size=60),
    num_blocks=st.integers(1, 9),
)
def test_the_pool_agrees_with_a_plain_model_after_any_use(moves: list[tuple[str, int, bool]], num_blocks: int) -> None:
    pool, model = BlockPool(num_blocks, block_size=4), BlockModel(num_blocks)
    held: list[list[int]] = []
    for text, num_plain, is_release in moves:
        if is_release and held:
            blocks = held.pop(0)
            pool.free(blocks)
            model.free(blocks)
        shared = pool.match(_hashes(text))
        assert shared == model.match(_hashes(text))
        num_new = len(text) - len(shared) + num_plain
        blocks = pool.take(shared, num_new=num_new)
        assert (blocks is not None) == model.can_take(shared, num_new)
        if blocks is not None:
            assert blocks[: len(shared)] == shared
            model.take(shared, blocks[len(shared) :])
            for block, one in zip(blocks, _hashes(text), strict=False):
                pool.register(block, one)
                model.register(block, one)
            held.append(blocks)
        assert pool.num_free == model.num_free
        pool.check_integrity([block for blocks in held for block in blocks])
