"""Attention over copies of paged keys and values, with torch: prompts one by one, decoding rows together.

Serves GPUs, machines without compiled kernels and models that cap their scores. Knows blocks, positions and tensors.
The mask is made here, from positions. Source of the cap: https://arxiv.org/abs/2408.00118, section 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from server.engine.paged_kv import PagedKV, RowSpan, indices

__all__ = ["PlainAttention"]


class PlainAttention:
    """The attention of one step; built once, used by every layer."""

    def __init__(self, kv: PagedKV, rows: Sequence[RowSpan]) -> None:
        self._kv = kv
        self._prefill = [row for row in rows if row.num_tokens > 1]
        decode = [row for row in rows if row.num_tokens == 1]
        self._decode = _DecodeBatch(kv, decode) if decode else None

    def run_(self, output: Tensor, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, **terms: Any) -> None:
        """Write output (1, T, query heads, value dim) in place; query, key, value: (1, heads, T, dim), stored already.

        terms: scale, window, softcap.
        """
        if self._decode is not None:
            self._decode.run_(output, layer_idx, query, **terms)
        for row in self._prefill:
            span = slice(row.offset, row.offset + row.num_tokens)
            new = (query[:, :, span], key[:, :, span], value[:, :, span])
            output[:, span] = self._run_prefill(row, layer_idx, *new, **terms).transpose(1, 2)

    def _run_prefill(
        self,
        row: RowSpan,
        layer_idx: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        window: int | None,
        **terms: Any,
    ) -> Tensor:
        """Attend for the n new tokens of one row; query: (1, query heads, n, dim); returns (1, query heads, n, dim)."""
        if row.start > 0:
            num_blocks = -(-row.context_tokens // self._kv.block_tokens)
            key, value = self._kv.gather(layer_idx, indices([row.block_ids[:num_blocks]], self._kv))
            key, value = key[:, :, : row.context_tokens], value[:, :, : row.context_tokens]
        is_cut = window is not None and window < row.context_tokens
        mask = None
        if row.start > 0 or is_cut or terms["softcap"] is not None:
            positions = torch.arange(row.context_tokens, device=self._kv.device)
            mask = _visible(positions[row.start :], positions, window)
        return _attend(query, key, value, mask=mask, **terms)


class _DecodeBatch:
    """The rows with one new token each; they attend in one padded call."""

    def __init__(self, kv: PagedKV, rows: Sequence[RowSpan]) -> None:
        num_blocks = max(-(-row.context_tokens // kv.block_tokens) for row in rows)
        # Short rows repeat a block of their own: what is masked there cannot carry a NaN from one row to another.
        padded = [(row.block_ids + row.block_ids[:1] * num_blocks)[:num_blocks] for row in rows]
        self._kv = kv
        self._blocks = indices(padded, kv)
        self._offsets = indices([row.offset for row in rows], kv)
        self._last = indices([[row.start] for row in rows], kv)
        self._masks: dict[int | None, Tensor] = {}

    def run_(self, output: Tensor, layer_idx: int, query: Tensor, *, window: int | None, **terms: Any) -> None:
        """Write these rows of output (1, T, query heads, dim) in place; query: (1, query heads, T, dim)."""
        keys, values = self._kv.gather(layer_idx, self._blocks)
        num_rows, num_heads, num_positions, _ = keys.shape
        if window not in self._masks:
            positions = torch.arange(num_positions, device=self._kv.device)
            self._masks[window] = _visible(self._last, positions, window)[:, None]
        # The query heads of one key head stand where a sequence of queries would: they see the same positions.
        chosen = query[0].index_select(1, self._offsets).transpose(0, 1)
        grouped = chosen.reshape(num_rows, num_heads, -1, query.shape[3])
        mixed = _attend(grouped, keys, values, mask=self._masks[window], **terms)
        output[0].index_copy_(0, self._offsets, mixed.reshape(num_rows, -1, values.shape[3]))


def _visible(query_positions: Tensor, key_positions: Tensor, window: int | None) -> Tensor:
    """Return a boolean mask (..., queries, keys): a token sees itself and, within its window, what came before."""
    distance = query_positions[..., None] - key_positions
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """Return softmax(cap(scale * q k)) v, (B, query heads, n, dim); causal when mask is None. Key heads are shared."""
    if softcap is None:
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
        )
    assert mask is not None
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = torch.tanh(query @ key.transpose(2, 3) * (scale / softcap)) * softcap
    return torch.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1) @ value
