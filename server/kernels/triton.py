"""The formula of `server.kernels.base` on a GPU: one shrink and one expand for all adapters and members of a step.

Knows tensors, slots and segments. Tokens of one slot go in chunks of at most 16; tokens of the base are in no chunk and
cost nothing. Shrink computes v = A x over pieces of 1,024 inputs into a scratch tensor, at the true rank of each slot;
expand adds the pieces in order, scales v, multiplies by B and finishes y. Nothing is added atomically, and every chunk
is computed as if it had 16 tokens, so what a row gets does not depend on the other rows.

Static, so that CUDA graphs can capture a step: the grids (chunks up to a power of two, pieces of the inputs, tiles of
the outputs, members), the scratch (pieces, members, T, a power of two no rank exceeds; float32), and the addresses of
chunks and slot tables. Ranks and weights are read on the device. `TritonKernel.graph_key` says which steps may replay.

Sources: Punica https://arxiv.org/abs/2310.18547 (pointers to weights), S-LoRA https://arxiv.org/abs/2311.03285 (true
ranks), split sums as in https://arxiv.org/abs/2402.00025 but without its atomic additions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from server.kernels import triton_programs
from server.kernels.base import Kernel, Member, Segments, SlotWeights
from server.kernels.triton_tables import StepChunks, Tables

__all__ = ["TritonKernel", "build_kernel"]

_BLOCK_OUT = int(triton_programs.BLOCK_OUT.value)
_PIECE_IN = int(triton_programs.PIECE_IN.value)
_CHUNK_TOKENS = int(triton_programs.CHUNK_TOKENS.value)
_BLOCK_IN_BYTES = 512  # Of one row of x or A that a program loads at a time.

# A program indexed by its grid; its arguments and constants have types only Triton knows.
_PROGRAMS: Any = triton_programs


class TritonKernel:
    """Launches the programs; keeps the tables of the linears it has seen. For one model, used by one thread."""

    def __init__(self) -> None:
        self._tables: dict[tuple[torch.dtype, torch.device], Tables] = {}
        self._chunks: dict[torch.device, StepChunks] = {}

    def scale_inputs(self, x: Tensor, *, segments: Segments, slots: Sequence[SlotWeights | None]) -> Tensor:
        """Return u[t] = x[t] * in_scale; x: (T, H). x itself when no slot of this linear scales its input."""
        table = self._tables_for(x.dtype, x.device).of_slots(slots)
        chunks = self._chunks_of(segments, x.device)
        if not table.scales_inputs or not chunks.shape[0]:
            return x
        u = x.clone(memory_format=torch.contiguous_format)
        num_in = x.shape[1]
        _PROGRAMS.scale_inputs[chunks.shape[0], -(-num_in // _BLOCK_OUT)](u, table.fields, chunks, num_in)
        return u

    def apply_deltas_(
        self, y: Tensor, x: Tensor, *, segments: Segments, members: Sequence[Member], gates: Tensor | None = None
    ) -> None:
        """Apply every member to its columns of y (T, O_total), in place; x: (T, H) like y, gates: (T, K) float32.

        x and y are float32, float16 or bfloat16; weights of another dtype are converted when their slot is written.
        Raises ValueError when the columns of y do not lie side by side.
        """
        if y.stride(1) != 1:
            raise ValueError(f"y has strides {y.stride()}; its columns must lie side by side. Pass y.contiguous().")
        chunks = self._chunks_of(segments, x.device)
        if not chunks.shape[0]:
            return
        x = x if x.stride(1) == 1 else x.contiguous()
        gates = None if gates is None else gates.contiguous()
        group = self._tables_for(x.dtype, x.device).of_members(members)
        num_tokens, num_in = x.shape
        num_chunks, num_pieces, capacity = chunks.shape[0], -(-num_in // _PIECE_IN), group.rank_capacity
        scratch = x.new_empty((num_pieces, len(members), num_tokens, capacity), dtype=torch.float32)
        if capacity:
            _PROGRAMS.shrink[num_chunks, num_pieces, len(members)](
                x, scratch, group.places, chunks, x.stride(0), num_in, num_tokens, capacity,
                BLOCK_IN=_BLOCK_IN_BYTES // x.dtype.itemsize, ALIGNED=group.aligned,
            )  # fmt: skip
        num_experts = 0 if gates is None else gates.shape[1]
        _PROGRAMS.expand[num_chunks, -(-group.max_width // _BLOCK_OUT), len(members)](
            y, scratch, gates, group.places, chunks, y.stride(0), num_experts, num_tokens, num_pieces, capacity,
            ALIGNED=group.aligned,
        )  # fmt: skip

    def graph_key(
        self, segments: Segments, groups: Sequence[Sequence[Member]], *, dtype: torch.dtype, device: torch.device
    ) -> tuple[int, ...]:
        """Write chunks and tables for a step, and return what a CUDA graph of its launches depends on.

        groups: the members of every call of the step. A graph captured under a key may replay every step with the same
        key and the same shapes of x, y and gates; call this before each replay, outside of any capture.
        """
        key = [self._chunks_of(segments, device).shape[0]]
        for members in groups:
            group = self._tables_for(dtype, device).of_members(members)
            key += [group.rank_capacity, group.aligned, *(table.scales_inputs for table in group.tables)]
        return tuple(key)

    def _tables_for(self, dtype: torch.dtype, device: torch.device) -> Tables:
        if (dtype, device) not in self._tables:
            self._tables[dtype, device] = Tables(dtype=dtype, device=device)
        return self._tables[dtype, device]

    def _chunks_of(self, segments: Segments, device: torch.device) -> Tensor:
        if device not in self._chunks:
            self._chunks[device] = StepChunks(device, max_tokens=_CHUNK_TOKENS)
        return self._chunks[device].of_step(segments)


def build_kernel() -> Kernel:
    """Return the kernel; what it remembers between steps belongs to it alone."""
    launcher = TritonKernel()
    return Kernel("triton", launcher.scale_inputs, launcher.apply_deltas_)
