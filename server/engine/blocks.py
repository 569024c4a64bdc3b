"""Which blocks of the key-value memory are free. Knows numbers, no tensors and no sequences.

Source of paged key-value memory: https://arxiv.org/abs/2309.06180.
"""

from __future__ import annotations

from adapterhub.errors import EngineStateError

__all__ = ["BlockPool"]


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens, each free or in use by one sequence."""

    def __init__(self, num_blocks: int, *, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._is_free = [True] * num_blocks

    @property
    def num_free(self) -> int:
        """Blocks nobody uses."""
        return len(self._free)

    def num_needed(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, num_blocks: int) -> list[int] | None:
        """Take blocks, or None when fewer are free; never a part of them."""
        if num_blocks > len(self._free):
            return None
        taken = [self._free.pop() for _ in range(num_blocks)]
        for block in taken:
            self._is_free[block] = False
        return taken

    def free(self, blocks: list[int]) -> None:
        """Give blocks back. Raises EngineStateError for a block that is not in use."""
        for block in blocks:
            if not 0 <= block < self.num_blocks or self._is_free[block]:
                raise EngineStateError(
                    f"Block {block} is given back but not in use.", "This is a mistake in the engine."
                )
            self._is_free[block] = True
            self._free.append(block)

    def check_integrity(self, in_use: list[int]) -> None:
        """Check that the blocks in use are exactly `in_use`. Raises EngineStateError naming those that differ."""
        expected = {block for block in range(self.num_blocks) if not self._is_free[block]}
        if (
            len(set(in_use)) != len(in_use)
            or set(in_use) != expected
            or len(self._free) + len(expected) != self.num_blocks
        ):
            differing = sorted(expected ^ set(in_use))
            raise EngineStateError(
                f"The block pool and its users disagree about blocks {differing}; {len(in_use)} are in use.",
                "This is a mistake in the engine; restart the server and report it.",
            )
