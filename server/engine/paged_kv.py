"""Keys and values in blocks, and where the rows of a step have theirs.

Knows blocks, positions and tensors. Does not know requests or adapters. Source of paging:
https://arxiv.org/abs/2309.06180, section 4.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from server.kernels.native import find_library

__all__ = ["HeadShape", "PagedKV", "RowSpan", "indices"]


@dataclass(frozen=True, slots=True)
class HeadShape:
    """What one attention layer stores per token: num_heads keys of key_dim numbers and as many values of value_dim."""

    num_heads: int
    key_dim: int
    value_dim: int


class PagedKV:
    """Blocks of keys and values, one pool per layer; a block holds `block_tokens` tokens of one row, by head."""

    def __init__(
        self, shapes: Sequence[HeadShape], *, num_blocks: int, block_tokens: int, device: torch.device
    ) -> None:
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self.device = device
        self.library = find_library() if device.type == "cpu" else None

        def pool(num_heads: int, dim: int) -> Tensor:
            return torch.zeros(num_blocks, num_heads, block_tokens, dim, device=device)

        self._keys = [pool(shape.num_heads, shape.key_dim) for shape in shapes]
        self._values = [pool(shape.num_heads, shape.value_dim) for shape in shapes]

    def write_(self, layer_idx: int, places: Tensor, key: Tensor, value: Tensor, *, begun: Tensor) -> None:
        """Store T tokens; places: (T,) block * block_tokens + offset; key, value: (1, heads, T, dim).

        begun: blocks whose first token is among them. They are cleared before: a NaN left by their last owner would
        pass through the mask, because zero times NaN is NaN.
        """
        for pool, new in ((self._keys[layer_idx], key), (self._values[layer_idx], value)):
            if self.library is None:
                pool.index_fill_(0, begun, 0.0)
                by_token = pool.transpose(1, 2)
                by_token[places // self.block_tokens, places % self.block_tokens] = new[0].transpose(0, 1)
                continue
            new = new if new.stride(3) == 1 else new.contiguous()
            _, num_heads, num_tokens, dim = new.shape
            sizes = (num_tokens, num_heads, dim, new.stride(1), new.stride(2), self.block_tokens)
            self.library.write_cache(pool.data_ptr(), new.data_ptr(), places.data_ptr(), *sizes)

    def pools(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Return all keys and all values of a layer, (blocks, heads, block_tokens, dim)."""
        return self._keys[layer_idx], self._values[layer_idx]

    def gather(self, layer_idx: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values (rows, heads, N * block_tokens, dim) of the blocks (rows, N)."""
        num_rows = blocks.shape[0]
        found = (
            pool.index_select(0, blocks.flatten()).view(num_rows, -1, *pool.shape[1:]).transpose(1, 2).flatten(2, 3)
            for pool in (self._keys[layer_idx], self._values[layer_idx])
        )
        key, value = found
        return key, value


@dataclass(frozen=True, slots=True)
class RowSpan:
    """One row of a step: its tokens are [offset, offset + num_tokens) of the step, from position `start` on."""

    offset: int
    num_tokens: int
    start: int
    block_ids: tuple[int, ...]

    @property
    def context_tokens(self) -> int:
        """Tokens the last token of the row attends to, itself included."""
        return self.start + self.num_tokens


def indices(numbers: Sequence[Any], kv: PagedKV) -> Tensor:
    """Return numbers as int64 where the keys and values are."""
    return torch.tensor(numbers, dtype=torch.int64, device=kv.device)
