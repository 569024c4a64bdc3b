"""Which blocks of the key-value memory are used, and which of them can be used again for equal tokens.

A block is free or has users. A full block whose tokens are computed can be registered under a hash; sequences with the
same beginning then share it for reading. A registered block without users stays until its place is needed: the one
unused for longest goes first. Knows numbers and hashes, no tensors, tokens and sequences.

Sources: paged key-value memory https://arxiv.org/abs/2309.06180; reuse of hashed blocks
https://docs.vllm.ai/en/latest/design/prefix_caching.html.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from adapterhub.errors import EngineStateError

__all__ = ["BlockPool"]


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens, each free or used by one or more sequences."""

    def __init__(self, num_blocks: int, *, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._num_users = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        # As they are given away: those without a hash first, then the registered, unused for longest first.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks nobody uses, registered ones included."""
        return len(self._free)

    @property
    def num_registered(self) -> int:
        """Blocks that can be found by their hash."""
        return len(self._block_of)

    def num_needed(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """Return the blocks of the longest beginning of `hashes` that is registered. Nothing is taken."""
        found: list[int] = []
        for one in hashes:
            block = self._block_of.get(one)
            if block is None:
                break
            found.append(block)
        return found

    def take(self, shared: Sequence[int], *, num_new: int) -> list[int] | None:
        """Begin to use the registered blocks `shared` and `num_new` others; None, and no block, if too few are free."""
        if num_new + sum(block in self._free for block in shared) > len(self._free):
            return None
        for block in shared:
            self._free.pop(block, None)
            self._num_users[block] += 1
        return [*shared, *(self._reclaim() for _ in range(num_new))]

    def allocate(self, num_blocks: int) -> list[int] | None:
        """Take blocks, or None when fewer are free; never a part of them."""
        return self.take((), num_new=num_blocks)

    def register(self, block: int, block_hash: bytes) -> None:
        """Let a block in use, full of computed tokens, be found by its hash. The first block with a hash keeps it."""
        if self._num_users[block] == 0:
            raise EngineStateError(f"Block {block} is registered but not in use.", "This is a mistake in the engine.")
        if block_hash not in self._block_of and self._hash_of[block] is None:
            self._block_of[block_hash] = block
            self._hash_of[block] = block_hash

    def free(self, blocks: Sequence[int]) -> None:
        """Stop to use blocks, given in the order of their tokens. Raises EngineStateError for a block not in use.

        The last one is given away first: without it the blocks before it are still a beginning.
        """
        for block in reversed(blocks):
            if not 0 <= block < self.num_blocks or self._num_users[block] == 0:
                raise EngineStateError(
                    f"Block {block} is given back but not in use.", "This is a mistake in the engine."
                )
            self._num_users[block] -= 1
            if self._num_users[block] == 0:
                self._free[block] = None
                if self._hash_of[block] is None:
                    self._free.move_to_end(block, last=False)

    def check_integrity(self, in_use: Sequence[int]) -> None:
        """Check that `in_use` names each block once per user, and that the free list and the hashes fit.

        Raises EngineStateError naming the blocks that differ.
        """
        users = Counter(in_use)
        wrong = {block for block in range(self.num_blocks) if self._num_users[block] != users[block]}
        wrong |= {block for block in range(self.num_blocks) if (self._num_users[block] == 0) != (block in self._free)}
        wrong |= {block for one, block in self._block_of.items() if self._hash_of[block] != one}
        wrong |= set(users) - set(range(self.num_blocks))
        num_hashes = sum(one is not None for one in self._hash_of)
        if wrong or num_hashes != len(self._block_of) or not self._is_free_list_in_order():
            raise EngineStateError(
                f"The block pool and its users disagree about blocks {sorted(wrong)}; {len(users)} are in use.",
                "This is a mistake in the engine; restart the server and report it.",
            )

    def _reclaim(self) -> int:
        """Take the free block whose content is worth least, and forget its content."""
        block, _ = self._free.popitem(last=False)
        block_hash = self._hash_of[block]
        if block_hash is not None:
            del self._block_of[block_hash]
            self._hash_of[block] = None
        self._num_users[block] = 1
        return block

    def _is_free_list_in_order(self) -> bool:
        is_registered = [self._hash_of[block] is not None for block in self._free]
        return is_registered == sorted(is_registered)
