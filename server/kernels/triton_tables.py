"""What the Triton kernels read besides activations: where the weights of each slot lie, and how the step is cut.

Knows tensors, slots and segments; launches nothing. A weight is addressed by its pointer, as in Punica
(https://arxiv.org/abs/2310.18547), so that a step copies none; the tables change only when a slot is written, and stay
where they are on the device, so that captured CUDA graphs read what was written last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from server.kernels.base import Member, Segments, SlotWeights

__all__ = ["Group", "SlotTable", "StepChunks", "Tables"]

# int64 per slot: the addresses of a, b, rank_scale, delta_scale, out_scale, out_shift, in_scale, expert_of_rank (0 for
# None), the rank, and the elements from one rank component to the next in a and in b. The programs read them by number.
_NUM_FIELDS = 11
# Wide loads need addresses that are multiples of the first, and strides and columns that are multiples of the second.
_ALIGNED_BYTES = 16
_ALIGNED_ELEMENTS = 8
_SMALLEST_CAPACITY = 16

_Slots = Sequence[SlotWeights | None]


class SlotTable:
    """The slots of one linear. fields: (num_slots, 11) int64 on the device, written in place.

    What the slots held at the last update stays alive until the next, since the device has its addresses.

    rank_capacity: a power of two no rank exceeds, 0 without ranks, never smaller than before. aligned: whether wide
    loads are possible everywhere. scales_inputs: whether some slot has an in_scale.
    """

    def __init__(self, slots: _Slots, *, device: torch.device) -> None:
        self.fields = torch.zeros(len(slots), _NUM_FIELDS, dtype=torch.int64, device=device)
        self.rank_capacity = 0
        self.aligned = True
        self.scales_inputs = False
        self._slots: list[SlotWeights | None] = [None] * len(slots)
        self._kept: list[Tensor] = []

    def update(self, slots: _Slots, *, fitted: _Fitted) -> None:
        """Write the table again if a slot holds another object than at the last call."""
        if self._slots == list(slots):
            return
        self._slots, self._kept = list(slots), []
        rows = [self._row(weights, fitted) for weights in slots]
        self.fields.copy_(torch.tensor(rows, dtype=torch.int64))
        max_rank = max(row[8] for row in rows)
        if max_rank > self.rank_capacity:
            self.rank_capacity = max(_SMALLEST_CAPACITY, 1 << (max_rank - 1).bit_length())
        self.scales_inputs = any(row[6] for row in rows)
        edges = [(edge, _ALIGNED_BYTES) for row in rows for edge in row[:2]]
        edges += [(stride, _ALIGNED_ELEMENTS) for row in rows for stride in row[9:]]
        self.aligned = all(value % unit == 0 for value, unit in edges)

    def _row(self, weights: SlotWeights | None, fitted: _Fitted) -> list[int]:
        if weights is None:
            return [0] * _NUM_FIELDS
        scales = (weights.rank_scale, weights.delta_scale, weights.out_scale, weights.out_shift, weights.in_scale)
        diagonals = [None if scale is None else scale.to(torch.float32).contiguous() for scale in scales]
        expert = None if weights.expert_of_rank is None else weights.expert_of_rank.contiguous()
        a = b = None
        if weights.a is not None and weights.b is not None and weights.a.shape[0]:
            a, b = fitted.a(weights.a), fitted.b(weights.b)
        addresses = [self._address(tensor) for tensor in (a, b, *diagonals, expert)]
        if a is None or b is None:
            return [*addresses, 0, 0, 0]
        strides = [a.stride(0), b.stride(0)] if a.shape[0] > 1 else [0, 0]
        return [*addresses, a.shape[0], *strides]

    def _address(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        self._kept.append(tensor)
        return tensor.data_ptr()


class _Fitted:
    """Projections as the kernels load them: in `dtype`, the elements of one rank component side by side.

    Tensors that lie otherwise are copied once for all slots that share them, when a slot is written.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._copies = WeakTensorKeyDictionary()

    def a(self, tensor: Tensor) -> Tensor:
        """Return A (R, H), its copy if it does not lie well."""
        return self._fit(tensor, tensor)

    def b(self, tensor: Tensor) -> Tensor:
        """Return the transpose (R, O) of B (O, R), a copy if B is not stored by columns."""
        return self._fit(tensor, tensor.t())

    def _fit(self, source: Tensor, wanted: Tensor) -> Tensor:
        if wanted.stride(1) == 1 and wanted.dtype is self.dtype:
            return wanted
        if source not in self._copies:
            self._copies[source] = wanted.to(self.dtype, copy=True, memory_format=torch.contiguous_format)
        return self._copies[source]


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """The members of one launch. places: (members, 3) int64 on the device: address of the table, start, width."""

    places: Tensor
    tables: tuple[SlotTable, ...]
    max_width: int
    has_aligned_columns: bool

    @property
    def rank_capacity(self) -> int:
        """A power of two that no rank of the group exceeds; 0 without ranks."""
        return max(table.rank_capacity for table in self.tables)

    @property
    def aligned(self) -> bool:
        """Whether wide loads are possible everywhere."""
        return self.has_aligned_columns and all(table.aligned for table in self.tables)


class Tables:
    """The tables of all linears of one model, for activations of one dtype on one device.

    Linears are told apart by their live list of slots, which is kept alive.
    """

    def __init__(self, *, dtype: torch.dtype, device: torch.device) -> None:
        self._device = device
        self._fitted = _Fitted(dtype)
        self._tables: dict[int, tuple[_Slots, SlotTable]] = {}
        self._groups: dict[tuple[tuple[int, int, int], ...], Group] = {}

    def of_slots(self, slots: _Slots) -> SlotTable:
        """Return the table of one linear, up to date."""
        if id(slots) not in self._tables:
            self._tables[id(slots)] = (slots, SlotTable(slots, device=self._device))
        table = self._tables[id(slots)][1]
        table.update(slots, fitted=self._fitted)
        return table

    def of_members(self, members: Sequence[Member]) -> Group:
        """Return the group of the linears that are packed side by side, up to date."""
        tables = tuple(self.of_slots(member.slots) for member in members)
        key = tuple((id(member.slots), member.start, member.width) for member in members)
        if key not in self._groups:
            addressed = zip(tables, members, strict=True)
            places = [[table.fields.data_ptr(), member.start, member.width] for table, member in addressed]
            placed = torch.tensor(places, dtype=torch.int64).to(self._device)
            has_aligned = all(edge % _ALIGNED_ELEMENTS == 0 for row in places for edge in row[1:])
            self._groups[key] = Group(placed, tables, max(member.width for member in members), has_aligned)
        return self._groups[key]


class StepChunks:
    """The tokens of adapters in a step, in chunks of at most `max_tokens` that use one slot.

    There is one tensor per power of two of chunks, written in place; what a step does not use has slot -1.
    """

    def __init__(self, device: torch.device, *, max_tokens: int) -> None:
        self._device = device
        self._max_tokens = max_tokens
        self._segments: Segments | None = None
        self._tensors: dict[int, Tensor] = {}
        self._current = torch.empty(0, 3, dtype=torch.int32, device=device)

    def of_step(self, segments: Segments) -> Tensor:
        """Return (C, 3) int32: slot, first token, number of tokens; computed once per Segments object."""
        if segments is self._segments:
            return self._current
        chunks: list[tuple[int, int, int]] = []
        first = 0
        for owner, size in zip(segments.owner, segments.sizes_tokens, strict=True):
            if owner >= 0:
                begins = range(0, size, self._max_tokens)
                chunks += [(owner, first + begin, min(self._max_tokens, size - begin)) for begin in begins]
            first += size
        capacity = 1 << (len(chunks) - 1).bit_length() if chunks else 0
        if capacity not in self._tensors:
            self._tensors[capacity] = torch.empty(capacity, 3, dtype=torch.int32, device=self._device)
        filled = chunks + [(-1, 0, 0)] * (capacity - len(chunks))
        self._current = self._tensors[capacity]
        self._current.copy_(torch.tensor(filled, dtype=torch.int32).view(-1, 3))
        self._segments = segments
        return self._current
