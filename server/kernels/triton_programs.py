"""The programs that run on the GPU: scale the inputs, shrink, expand. `server.kernels.triton` launches them.

Each program works on one chunk of at most CHUNK_TOKENS tokens that use one slot, and returns at once for a chunk
without a slot. Reads the tables of `server.kernels.triton_tables`; sums are float32; no atomic operations.
"""
# Triton derives the types of a program from its launch.
# ruff: noqa: ANN001, ANN201, ANN202
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["BLOCK_OUT", "BLOCK_RANK", "CHUNK_TOKENS", "PIECE_IN", "expand", "scale_inputs", "shrink"]

CHUNK_TOKENS = tl.constexpr(16)
BLOCK_RANK = tl.constexpr(16)
BLOCK_OUT = tl.constexpr(128)
PIECE_IN = tl.constexpr(1024)

# Numbers of the fields of a slot, see `server.kernels.triton_tables`.
_A = tl.constexpr(0)
_B = tl.constexpr(1)
_RANK_SCALE = tl.constexpr(2)
_DELTA_SCALE = tl.constexpr(3)
_OUT_SCALE = tl.constexpr(4)
_OUT_SHIFT = tl.constexpr(5)
_IN_SCALE = tl.constexpr(6)
_EXPERT_OF_RANK = tl.constexpr(7)
_RANK = tl.constexpr(8)
_A_STRIDE = tl.constexpr(9)
_B_STRIDE = tl.constexpr(10)
_NUM_FIELDS = tl.constexpr(11)


@triton.jit
def scale_inputs(u_ptr, fields_ptr, chunks_ptr, num_in):
    """Multiply the tokens of a chunk by in_scale, in place, BLOCK_OUT columns of u (T, H) per program."""
    chunks_ptr += tl.program_id(0) * 3
    slot = tl.load(chunks_ptr)
    if slot < 0:
        return
    address = tl.load(fields_ptr + slot * _NUM_FIELDS + _IN_SCALE)
    if address == 0:
        return
    column = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    scale = _load_scale(address, column, column < num_in)
    token, has_token = _tokens(chunks_ptr)
    places = u_ptr + token[:, None] * num_in + column[None, :]
    mask = has_token[:, None] & (column < num_in)[None, :]
    u = tl.load(places, mask=mask, other=0.0)
    tl.store(places, (u.to(tl.float32) * scale[None, :]).to(u.dtype), mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def shrink(
    x_ptr, scratch_ptr, places_ptr, chunks_ptr, x_stride, num_in, num_tokens, capacity,
    BLOCK_IN: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Write v[t, r] = sum of x[t, h] A[r, h] over one piece of the inputs, for one chunk and one member."""
    chunks_ptr += tl.program_id(0) * 3
    piece = tl.program_id(1)
    member = tl.program_id(2)
    slot = tl.load(chunks_ptr)
    if slot < 0:
        return
    fields_ptr = tl.load(places_ptr + member * 3).to(tl.pointer_type(tl.int64)) + slot * _NUM_FIELDS
    rank = tl.load(fields_ptr + _RANK).to(tl.int32)
    a_ptr = tl.load(fields_ptr + _A).to(tl.pointer_type(x_ptr.dtype.element_ty))
    a_stride = tl.load(fields_ptr + _A_STRIDE)
    if ALIGNED:
        a_ptr = tl.multiple_of(a_ptr, 16)
        a_stride = tl.multiple_of(a_stride, 8)
    token, has_token = _tokens(chunks_ptr)
    scratch_ptr += ((piece * tl.num_programs(2) + member).to(tl.int64) * num_tokens + token)[:, None] * capacity
    stop = tl.minimum((piece + 1) * PIECE_IN, num_in)
    for first_rank in range(0, rank, BLOCK_RANK):
        component = first_rank + tl.arange(0, BLOCK_RANK)
        has_component = component < rank
        total = tl.zeros((CHUNK_TOKENS, BLOCK_RANK), dtype=tl.float32)
        for first_in in range(piece * PIECE_IN, stop, BLOCK_IN):
            column = first_in + tl.arange(0, BLOCK_IN)
            x_mask = has_token[:, None] & (column < stop)[None, :]
            x = tl.load(x_ptr + token[:, None] * x_stride + column[None, :], mask=x_mask, other=0.0)
            a_mask = has_component[None, :] & (column < stop)[:, None]
            a = tl.load(a_ptr + component[None, :] * a_stride + column[:, None], mask=a_mask, other=0.0)
            total = tl.dot(x, a, total, input_precision="ieee")
        tl.store(scratch_ptr + component[None, :], total, mask=has_token[:, None] & has_component[None, :])


@triton.jit(do_not_specialize=["num_tokens"])
def expand(
    y_ptr, scratch_ptr, gates_ptr, places_ptr, chunks_ptr, y_stride, num_experts, num_tokens, num_pieces, capacity,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Finish BLOCK_OUT columns of y for one chunk and one member."""
    chunks_ptr += tl.program_id(0) * 3
    member = tl.program_id(2)
    places_ptr += member * 3
    slot = tl.load(chunks_ptr)
    start = tl.load(places_ptr + 1)
    width = tl.load(places_ptr + 2).to(tl.int32)
    if ALIGNED:
        start = tl.multiple_of(start, 8)
        width = tl.multiple_of(width, 8)
    first_out = tl.program_id(1) * BLOCK_OUT
    if (slot < 0) | (first_out >= width):
        return
    fields_ptr = tl.load(places_ptr).to(tl.pointer_type(tl.int64)) + slot * _NUM_FIELDS
    out_scale = tl.load(fields_ptr + _OUT_SCALE)
    out_shift = tl.load(fields_ptr + _OUT_SHIFT)
    if (tl.load(fields_ptr + _RANK) == 0) & (out_scale == 0) & (out_shift == 0):
        return
    column = first_out + tl.arange(0, BLOCK_OUT)
    inside = column < width
    token, has_token = _tokens(chunks_ptr)
    places = y_ptr + token[:, None] * y_stride + (start + column)[None, :]
    mask = has_token[:, None] & inside[None, :]
    y = tl.load(places, mask=mask, other=0.0).to(tl.float32)
    y += _delta(
        scratch_ptr, gates_ptr, fields_ptr, token, has_token, column, inside, member,
        num_experts, num_tokens, num_pieces, capacity, y_ptr.dtype.element_ty, ALIGNED,
    )  # fmt: skip
    if out_scale != 0:
        y *= _load_scale(out_scale, column, inside)[None, :]
    if out_shift != 0:
        y += _load_scale(out_shift, column, inside)[None, :]
    tl.store(places, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _delta(
    scratch_ptr, gates_ptr, fields_ptr, token, has_token, column, inside, member,
    num_experts, num_tokens, num_pieces, capacity, DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Return delta_scale * (B v) at the columns, (CHUNK_TOKENS, BLOCK_OUT) float32; zeros without ranks."""
    rank = tl.load(fields_ptr + _RANK).to(tl.int32)
    b_ptr = tl.load(fields_ptr + _B).to(tl.pointer_type(DTYPE))
    b_stride = tl.load(fields_ptr + _B_STRIDE)
    if ALIGNED:
        b_ptr = tl.multiple_of(b_ptr, 16)
        b_stride = tl.multiple_of(b_stride, 8)
    total = tl.zeros((CHUNK_TOKENS, BLOCK_OUT), dtype=tl.float32)
    for first_rank in range(0, rank, BLOCK_RANK):
        component = first_rank + tl.arange(0, BLOCK_RANK)
        has_component = component < rank
        v = _scaled_v(
            scratch_ptr, gates_ptr, fields_ptr, token, has_token, component, has_component, member,
            num_experts, num_tokens, num_pieces, capacity,
        )  # fmt: skip
        b_mask = has_component[:, None] & inside[None, :]
        b = tl.load(b_ptr + component[:, None] * b_stride + column[None, :], mask=b_mask, other=0.0)
        total = tl.dot(v.to(DTYPE), b, total, input_precision="ieee")
    delta_scale = tl.load(fields_ptr + _DELTA_SCALE)
    if delta_scale != 0:
        total *= _load_scale(delta_scale, column, inside)[None, :]
    return total


@triton.jit
def _scaled_v(
    scratch_ptr, gates_ptr, fields_ptr, token, has_token, component, has_component, member,
    num_experts, num_tokens, num_pieces, capacity,
):  # fmt: skip
    """Return v (CHUNK_TOKENS, BLOCK_RANK) float32: the sum of its pieces, in order, times rank_scale and gates."""
    mask = has_token[:, None] & has_component[None, :]
    v = tl.zeros((CHUNK_TOKENS, BLOCK_RANK), dtype=tl.float32)
    for piece in range(num_pieces):
        row = (piece * tl.num_programs(2) + member).to(tl.int64) * num_tokens + token
        v += tl.load(scratch_ptr + row[:, None] * capacity + component[None, :], mask=mask, other=0.0)
    rank_scale = tl.load(fields_ptr + _RANK_SCALE)
    if rank_scale != 0:
        v *= _load_scale(rank_scale, component, has_component)[None, :]
    if gates_ptr is not None:
        address = tl.load(fields_ptr + _EXPERT_OF_RANK)
        if address != 0:
            expert = tl.load(address.to(tl.pointer_type(tl.int64)) + component, mask=has_component, other=0)
            v *= tl.load(gates_ptr + token[:, None] * num_experts + expert[None, :], mask=mask, other=0.0)
    return v


@triton.jit
def _tokens(chunks_ptr):
    """Return the places of the tokens of a chunk in the step, and which of the CHUNK_TOKENS exist."""
    idx = tl.arange(0, CHUNK_TOKENS)
    return (tl.load(chunks_ptr + 1) + idx).to(tl.int64), idx < tl.load(chunks_ptr + 2)


@triton.jit
def _load_scale(address, idx, mask):
    """Return the float32 values at `idx` of the vector that starts at an address."""
    return tl.load(address.to(tl.pointer_type(tl.float32)) + idx, mask=mask, other=0.0)
