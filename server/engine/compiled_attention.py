"""Attention that reads paged keys and values where they lie, in compiled code; see attention.c.

Every token attends for itself, over its positions in order. What it gets depends neither on the other tokens of the
step nor on how a prompt was cut into pieces, to the last bit. Knows blocks, positions and tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from server.engine.paged_kv import PagedKV, RowSpan, indices
from server.kernels.native import Library

__all__ = ["CompiledAttention"]


class CompiledAttention:
    """The attention of one step; built once, used by every layer."""

    def __init__(self, kv: PagedKV, rows: Sequence[RowSpan], library: Library) -> None:
        self._kv = kv
        self._rows = rows
        self._library = library
        self._blocks = indices([block for row in rows for block in row.block_ids], kv)
        self._max_positions = max(row.context_tokens for row in rows)
        self._tokens: dict[int | None, Tensor] = {}

    def can_run(self, query: Tensor, value_dim: int) -> bool:
        """Tell whether the heads of query (1, heads, T, dim) and of the values are narrow enough."""
        return max(query.shape[3], value_dim) <= self._library.max_head_dim

    def run_(
        self,
        output: Tensor,
        layer_idx: int,
        query: Tensor,
        *,
        window: int | None,
        scale: float,
        softcap: float | None,
    ) -> None:
        """Write output (1, T, query heads, value dim) in place; query: (1, query heads, T, dim)."""
        if window not in self._tokens:
            self._tokens[window] = self._describe(window)
        tokens = self._tokens[window]
        keys, values = self._kv.pools(layer_idx)
        query = query if query.stride(3) == 1 else query.contiguous()
        self._library.decode_attention(
            output.data_ptr(),
            query.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            tokens.data_ptr(),
            self._blocks.data_ptr(),
            tokens.shape[0],
            keys.shape[1],
            query.shape[1] // keys.shape[1],
            keys.shape[3],
            values.shape[3],
            self._kv.block_tokens,
            query.stride(1),
            query.stride(2),
            self._max_positions,
            scale,
            softcap or 0.0,
            self._library.num_threads,
        )

    def _describe(self, window: int | None) -> Tensor:
        """Per token: its offset in the step, its position, the first position it sees, its row's first block; int64."""
        tokens: list[tuple[int, int, int, int]] = []
        first_block = 0
        for row in self._rows:
            for idx in range(row.num_tokens):
                position = row.start + idx
                first = 0 if window is None else max(0, position + 1 - window)
                tokens.append((row.offset + idx, position, first, first_block))
            first_block += len(row.block_ids)
        return indices(tokens, self._kv)
