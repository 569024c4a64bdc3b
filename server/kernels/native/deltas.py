"""The formula of `server.kernels.base` in compiled code: one call for all members and segments of a group.

Knows tensors and segments. Where a slot's tensors lie is kept per group and looked up again only when a slot changed;
the cut of the step into chunks is kept for as long as the step lasts. See adapters.c.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional

from adapterhub.errors import SettingsError
from server.kernels.base import Kernel, Member, Segments, SlotWeights, by_columns
from server.kernels.cpu import scale_inputs
from server.kernels.native.library import Library, find_library

__all__ = ["build_kernel"]

_NUM_FIELDS = 11  # Numbers of one slot_weights in adapters.c.
_LINE_BYTES = 64


class _Place:
    """One slot at one member, as the numbers adapters.c reads. kept: every tensor an address points into."""

    def __init__(self, weights: SlotWeights | None) -> None:
        self.weights = weights
        self.rank = self.num_experts = 0
        self.kept: list[Tensor] = []
        self.reads: list[tuple[int, int]] = []  # Addresses and numbers of lines.
        self.numbers = [0] * _NUM_FIELDS if weights is None else self._numbers(weights)

    def _numbers(self, weights: SlotWeights) -> list[int]:
        a, b, strides = weights.a, weights.b, (0, 0)
        if a is not None and b is not None and a.shape[0]:
            a = a if a.stride(1) == 1 else a.contiguous()
            b = by_columns(b)
            self.rank, strides = a.shape[0], (a.stride(0), b.stride(1))
            # Projections that modules of several sizes share are cut from a wider piece, and stay in the caches anyway.
            whole = [one for one in (a, b.t()) if one.is_contiguous()]
            self.reads = [(one.data_ptr(), -(-one.nbytes // _LINE_BYTES)) for one in whole]
        scales = (weights.rank_scale, weights.delta_scale, weights.out_scale, weights.out_shift)
        diagonals = [None if one is None else one.contiguous() for one in (*scales, weights.expert_of_rank)]
        experts = weights.expert_of_rank
        self.num_experts = 0 if experts is None or not experts.numel() else int(experts.max()) + 1
        return [*(self._address(one) for one in (a, b, *diagonals)), self.rank, *strides, 1]

    def _address(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        self.kept.append(tensor)
        return tensor.data_ptr()


class _Table:
    """The slots of one group, a row of numbers per slot and member."""

    def __init__(self, members: Sequence[Member]) -> None:
        self._slots: list[list[SlotWeights | None]] = [[None] * len(member.slots) for member in members]
        self._places = [[_Place(None) for _ in member.slots] for member in members]
        self.fields = torch.zeros(len(members[0].slots), len(members), _NUM_FIELDS, dtype=torch.int64)
        self.columns = torch.tensor([[member.start, member.width] for member in members], dtype=torch.int64)
        self.max_rank = self.num_experts = 0
        self._reads: tuple[tuple[int, ...], Tensor] | None = None

    def reads(self, owners: tuple[int, ...]) -> Tensor:
        """Return the addresses and numbers of lines of what the slots `owners` hold, (N, 2) int64, each once."""
        if self._reads is None or self._reads[0] != owners:
            found = dict.fromkeys(
                read for slot in owners if slot >= 0 for column in self._places for read in column[slot].reads
            )
            self._reads = owners, torch.tensor(list(found), dtype=torch.int64).view(-1, 2)
        return self._reads[1]

    def update_(self, members: Sequence[Member]) -> None:
        """Look up again what changed since the last call: slots that hold another object."""
        if all(member.slots == column for member, column in zip(members, self._slots, strict=True)):
            return
        for index, (member, column) in enumerate(zip(members, self._slots, strict=True)):
            for slot, weights in enumerate(member.slots):
                if weights is not column[slot]:
                    place = self._places[index][slot] = _Place(weights)
                    self.fields[slot, index] = torch.tensor(place.numbers, dtype=torch.int64)
                    column[slot] = weights
        self._reads = None
        places = [place for column in self._places for place in column]
        self.max_rank = max(place.rank for place in places)
        self.num_experts = max(place.num_experts for place in places)


class _Deltas:
    """`apply_deltas_` with what it remembers between calls. Used by one thread."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._tables: WeakKeyDictionary[Member, _Table] = WeakKeyDictionary()
        self._segments: Segments | None = None
        self._chunks = torch.empty(0, 3, dtype=torch.int64)
        self._ready: tuple[Segments, Sequence[Member], _Table] | None = None  # By `reads`, for the call that follows.

    def apply_deltas_(
        self, y: Tensor, x: Tensor, *, segments: Segments, members: Sequence[Member], gates: Tensor | None = None
    ) -> None:
        """Turn y (T, O_total) = W u + bias into the result, in place; x: (T, H) float32, gates: (T, K) float32."""
        ready, self._ready = self._ready, None
        if ready is not None and ready[0] is segments and ready[1] is members:
            table = ready[2]
        else:
            table = self._prepare(segments, members)
        x = x if x.stride(1) == 1 else x.contiguous()
        if gates is not None:  # Experts that no row names get ones; C would read past the end of the row.
            gates = functional.pad(gates, (0, max(0, table.num_experts - gates.shape[1])), value=1.0).contiguous()
        self._library.apply_deltas(
            y.data_ptr(),
            x.data_ptr(),
            0 if gates is None else gates.data_ptr(),
            table.fields.data_ptr(),
            table.columns.data_ptr(),
            self._chunks.data_ptr(),
            self._chunks.shape[0],
            len(members),
            x.shape[1],
            y.stride(0),
            x.stride(0),
            0 if gates is None else gates.shape[1],
            table.max_rank,
            self._library.num_threads,
        )

    def reads(self, *, segments: Segments, members: Sequence[Member]) -> Tensor:
        """Return what `apply_deltas_` will read, (N, 2) int64: addresses and numbers of 64-byte lines.

        The call of `apply_deltas_` that follows with the same arguments finds the table ready; slots stay as they are
        between the two.
        """
        table = self._prepare(segments, members)
        self._ready = segments, members, table
        return table.reads(segments.owner)

    def _prepare(self, segments: Segments, members: Sequence[Member]) -> _Table:
        """Return the table of a group, up to date, and cut the step into chunks."""
        table = self._tables.get(members[0])
        if table is None:
            table = self._tables[members[0]] = _Table(members)
        table.update_(members)
        if segments is not self._segments:
            self._chunks, self._segments = _chunks(segments, self._library.chunk_tokens), segments
        return table


def build_kernel() -> Kernel:
    """Return a kernel; what it remembers belongs to it alone. Raises SettingsError where nothing can be compiled."""
    library = find_library()
    if library is None:
        raise SettingsError(
            "The kernel 'native' is not compiled here.", "Use 'cpu', or install the package ziglang on Linux."
        )
    deltas = _Deltas(library)
    return Kernel("native", scale_inputs, deltas.apply_deltas_, deltas.reads)


def _chunks(segments: Segments, max_tokens: int) -> Tensor:
    """Cut the segments of adapters into pieces (slot, first token, number of tokens), (C, 3) int64."""
    chunks: list[tuple[int, int, int]] = []
    first = 0
    for owner, size in zip(segments.owner, segments.sizes_tokens, strict=True):
        if owner >= 0:
            pieces = range(0, size, max_tokens)
            chunks += [(owner, first + begin, min(max_tokens, size - begin)) for begin in pieces]
        first += size
    return torch.tensor(chunks, dtype=torch.int64).view(-1, 3)
