"""Attention over paged keys and values, for rows of any length in one step, as an attention function of transformers.

Knows blocks, positions and tensors. Does not know requests, adapters or the scheduler. transformers builds no mask for
an attention function that registers none, so the mask is made here, from positions.
Source of paging: https://arxiv.org/abs/2309.06180, section 4.1. Softcap: https://arxiv.org/abs/2408.00118, section 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

from adapterhub.errors import UserInputError
from server.kernels.native import Library, find_library
from server.step_context import current_step

__all__ = [
    "ATTENTION_NAME",
    "AttentionStep",
    "HeadShape",
    "HeadShapeProbe",
    "PagedKV",
    "RowSpan",
    "register_paged_attention",
]

ATTENTION_NAME = "adapterhub_paged"
# Arguments with which transformers asks for another formula; ignoring one would answer wrongly.
_UNSUPPORTED = ("s_aux", "position_bias", "head_mask", "cache")


@dataclass(frozen=True, slots=True)
class HeadShape:
    """What one attention layer stores per token: num_heads keys of key_dim numbers and as many values of value_dim."""

    num_heads: int
    key_dim: int
    value_dim: int


class PagedKV:
    """Blocks of keys and values, one pool per layer; a block holds `block_tokens` tokens of one row."""

    def __init__(
        self, shapes: Sequence[HeadShape], *, num_blocks: int, block_tokens: int, device: torch.device
    ) -> None:
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self.device = device
        self.library = find_library() if device.type == "cpu" else None
        size = (num_blocks, block_tokens)
        self._keys = [torch.zeros(*size, shape.num_heads, shape.key_dim, device=device) for shape in shapes]
        self._values = [torch.zeros(*size, shape.num_heads, shape.value_dim, device=device) for shape in shapes]

    def write_(self, layer_idx: int, places: Tensor, key: Tensor, value: Tensor, *, begun: Tensor) -> None:
        """Store T tokens; places: (T,) block * block_tokens + offset; key, value: (1, heads, T, dim).

        begun: blocks whose first token is among them. They are cleared before: a NaN left by their last owner would
        pass through the mask, because zero times NaN is NaN.
        """
        for pool, new in ((self._keys[layer_idx], key), (self._values[layer_idx], value)):
            if self.library is None:
                pool.index_fill_(0, begun, 0.0)
                pool.view(-1, *pool.shape[2:]).index_copy_(0, places, new[0].transpose(0, 1))
                continue
            new = new if new.stride(3) == 1 else new.contiguous()
            _, num_heads, num_tokens, dim = new.shape
            sizes = (num_tokens, num_heads, dim, new.stride(1), new.stride(2), self.block_tokens)
            self.library.write_cache(pool.data_ptr(), new.data_ptr(), places.data_ptr(), *sizes)

    def pools(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Return all keys and all values of a layer, (blocks, block_tokens, heads, dim)."""
        return self._keys[layer_idx], self._values[layer_idx]

    def gather(self, layer_idx: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values (rows, heads, N * block_tokens, dim) of the blocks (rows, N)."""
        num_rows = blocks.shape[0]
        found = (
            pool.index_select(0, blocks.flatten()).view(num_rows, -1, *pool.shape[2:]).transpose(1, 2)
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


class HeadShapeProbe:
    """Stands in for AttentionStep while the runner asks what each attention layer would store."""

    def __init__(self) -> None:
        self.shapes: dict[int, HeadShape] = {}

    def run(self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, **terms: Any) -> Tensor:
        """Note the shape of key and value (1, heads, T, dim) and return zeros (1, T, query heads, value dim)."""
        del terms
        self.shapes[layer_idx] = HeadShape(key.shape[1], key.shape[3], value.shape[3])
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])


class AttentionStep:
    """The attention of one step; built once, used by every layer."""

    def __init__(self, kv: PagedKV, rows: Sequence[RowSpan]) -> None:
        self._kv = kv
        self._prefill = [row for row in rows if row.num_tokens > 1]
        decode = [row for row in rows if row.num_tokens == 1]
        self._decode = _DecodeBatch(kv, decode) if decode else None
        size = kv.block_tokens
        places = [
            row.block_ids[position // size] * size + position % size
            for row in rows
            for position in range(row.start, row.context_tokens)
        ]
        self._places = _indices(places, kv)
        self._begun = _indices([place // size for place in places if place % size == 0], kv)

    def run(self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, **terms: Any) -> Tensor:
        """Store the new keys and values and return the attended values (1, T, query heads, value dim).

        query: (1, query heads, T, dim); key, value: (1, heads, T, dim); terms: scale, window, softcap.
        """
        self._kv.write_(layer_idx, self._places, key, value, begun=self._begun)
        output = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
        if self._decode is not None:
            self._decode.run_(output, layer_idx, query, **terms)
        for row in self._prefill:
            span = slice(row.offset, row.offset + row.num_tokens)
            new = (query[:, :, span], key[:, :, span], value[:, :, span])
            output[:, span] = self._run_prefill(row, layer_idx, *new, **terms).transpose(1, 2)
        return output

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
            key, value = self._kv.gather(layer_idx, _indices([row.block_ids[:num_blocks]], self._kv))
            key, value = key[:, :, : row.context_tokens], value[:, :, : row.context_tokens]
        is_cut = window is not None and window < row.context_tokens
        mask = None
        if row.start > 0 or is_cut or terms["softcap"] is not None:
            positions = torch.arange(row.context_tokens, device=self._kv.device)
            mask = _visible(positions[row.start :], positions, window)
        return _attend(query, key, value, mask=mask, **terms)


class _DecodeBatch:
    """The rows with one new token each; they attend in one call."""

    def __init__(self, kv: PagedKV, rows: Sequence[RowSpan]) -> None:
        self._kv = kv
        self._rows = rows
        self._offsets = _indices([row.offset for row in rows], kv)
        self._flat_blocks = _indices([block for row in rows for block in row.block_ids], kv)
        self._max_positions = max(row.context_tokens for row in rows)
        self._places: dict[int | None, Tensor] = {}
        self._blocks: Tensor | None = None
        self._masks: dict[int | None, Tensor] = {}

    def run_(self, output: Tensor, layer_idx: int, query: Tensor, *, window: int | None, **terms: Any) -> None:
        """Write these rows of output (1, T, query heads, dim) in place; query: (1, query heads, T, dim)."""
        library = self._kv.library
        if (
            library is None
            or terms["softcap"] is not None
            or max(query.shape[3], output.shape[3]) > library.max_head_dim
        ):
            self._run_gathered_(output, layer_idx, query, window=window, **terms)
        else:
            self._run_in_place_(library, output, layer_idx, query, window=window, scale=terms["scale"])

    def _run_in_place_(
        self, library: Library, output: Tensor, layer_idx: int, query: Tensor, *, window: int | None, scale: float
    ) -> None:
        """Read keys and values where they lie; see attention.c."""
        if window not in self._places:
            self._places[window] = self._describe(window)
        places = self._places[window]
        keys, values = self._kv.pools(layer_idx)
        query = query if query.stride(3) == 1 else query.contiguous()
        library.decode_attention(
            output.data_ptr(),
            query.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            places.data_ptr(),
            self._flat_blocks.data_ptr(),
            len(self._rows),
            keys.shape[2],
            query.shape[1] // keys.shape[2],
            keys.shape[3],
            values.shape[3],
            self._kv.block_tokens,
            query.stride(1),
            query.stride(2),
            self._max_positions,
            scale,
            torch.get_num_threads(),
        )

    def _describe(self, window: int | None) -> Tensor:
        """Per row: offset of its token, its position, the first position it sees, index of its first block; int64."""
        starts = [0, *accumulate(len(row.block_ids) for row in self._rows)]
        firsts = [0 if window is None else max(0, row.start + 1 - window) for row in self._rows]
        rows = [(row.offset, row.start, first, at) for row, first, at in zip(self._rows, firsts, starts, strict=False)]
        return _indices(rows, self._kv)

    def _run_gathered_(
        self, output: Tensor, layer_idx: int, query: Tensor, *, window: int | None, **terms: Any
    ) -> None:
        """Attend over a padded copy of keys and values, all rows in one call."""
        if self._blocks is None:
            self._blocks = self._pad()
        keys, values = self._kv.gather(layer_idx, self._blocks)
        num_rows, num_heads, num_positions, _ = keys.shape
        if window not in self._masks:
            positions = torch.arange(num_positions, device=self._kv.device)
            last = _indices([[row.start] for row in self._rows], self._kv)
            self._masks[window] = _visible(last, positions, window)[:, None]
        # The query heads of one key head stand where a sequence of queries would: they see the same positions.
        chosen = query[0].index_select(1, self._offsets).transpose(0, 1)
        grouped = chosen.reshape(num_rows, num_heads, -1, query.shape[3])
        mixed = _attend(grouped, keys, values, mask=self._masks[window], **terms)
        output[0].index_copy_(0, self._offsets, mixed.reshape(num_rows, -1, values.shape[3]))

    def _pad(self) -> Tensor:
        """Give every row as many blocks as the longest has, (rows, N) int64.

        Short rows repeat a block of their own: what is masked there cannot carry a NaN from one row to another.
        """
        num_blocks = max(-(-row.context_tokens // self._kv.block_tokens) for row in self._rows)
        padded = [(row.block_ids + row.block_ids[:1] * num_blocks)[:num_blocks] for row in self._rows]
        return _indices(padded, self._kv)


def _indices(numbers: Sequence[Any], kv: PagedKV) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=kv.device)


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


def _paged_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Run the attention of `module` for the step in progress; the signature is that of transformers."""
    del attention_mask  # Always None: this function registers no mask.
    step = current_step()
    if step is None or step.attention is None:
        raise RuntimeError("The model attends outside a step. Use `Runner.step`, which owns its keys and values.")
    if not getattr(module, "is_causal", True) or kwargs.get("is_causal") is False:
        raise UserInputError(
            f"{type(module).__name__} attends to later tokens, which this server does not compute.",
            "Serve a model with plain causal attention.",
        )
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise UserInputError(
                f"{type(module).__name__} attends with {name!r}, which this server does not compute.",
                "Serve a model with plain causal attention.",
            )
    scale = kwargs.get("scaling")
    terms = {
        "scale": query.shape[-1] ** -0.5 if scale is None else scale,
        "window": kwargs.get("sliding_window"),
        "softcap": kwargs.get("softcap"),
    }
    return step.attention.run(int(module.layer_idx), query, key, value, **terms), None  # pyright: ignore[reportArgumentType]  # Set by transformers.


def register_paged_attention() -> None:
    """Make ATTENTION_NAME known to transformers; repeating it is harmless."""
    AttentionInterface.register(ATTENTION_NAME, _paged_attention)
