"""Weights packed for products with few rows, in float32, NF4 or 8-bit integers, and the products.

Knows tensors. A row's product does not depend on how many rows there are, to the last bit: every sum runs in one order.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from server.kernels.native.library import Library

__all__ = ["FloatWeight", "Int8Weight", "NF4Weight", "PackedWeight", "nf4_parts"]

_ALL = slice(None)
_LARGEST_CODE = 127  # Signed bytes without -128, so that codes are symmetric.
_CODE_OFFSET = 128
_NF4_BLOCK = 64
# Quantiles of a normal distribution, scaled to [-1, 1]. Source: https://arxiv.org/abs/2305.14314, appendix E.
_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


class PackedWeight(Protocol):
    """One weight (O, H) that is kept in packed form only."""

    shape: tuple[int, int]
    size_bytes: int

    def product(self, x: Tensor, bias: Tensor | None, ahead: Tensor | None = None) -> Tensor:
        """Return x W^T + bias (T, O) for x (T, H) float32 whose rows are contiguous.

        ahead: (N, 2) int64, addresses and numbers of 64-byte lines that will be read next; a product that is bound by
        arithmetic has them fetched meanwhile.
        """
        ...

    def unpacked(self, rows: slice = _ALL) -> Tensor:
        """Return some rows of the weight, (O', H) float32, as this multiplies with them."""
        ...


class FloatWeight:
    """A weight in float32, in panels that lie [panel][input][output]; see gemm_f32.c."""

    def __init__(self, weight: Tensor, library: Library) -> None:
        self.shape = (weight.shape[0], weight.shape[1])
        self._library = library
        self._panels = _panels(weight.to(torch.float32), library.panel_f32).permute(0, 2, 1).contiguous()
        self.size_bytes = self._panels.nbytes

    def product(self, x: Tensor, bias: Tensor | None, ahead: Tensor | None = None) -> Tensor:
        """Return x W^T + bias (T, O) for x (T, H) float32 whose rows are contiguous."""
        del ahead  # This product is bound by memory itself.
        num_out, num_in = self.shape
        y = torch.empty(x.shape[0], num_out)
        self._library.gemm_f32(
            y.data_ptr(),
            x.data_ptr(),
            self._panels.data_ptr(),
            _address(bias),
            x.shape[0],
            num_in,
            num_out,
            num_out,
            x.stride(0),
            self._library.num_threads,
        )
        return y

    def unpacked(self, rows: slice = _ALL) -> Tensor:
        """Return some rows of the weight, (O', H) float32, as this multiplies with them."""
        return self._panels.permute(0, 2, 1).reshape(-1, self.shape[1])[: self.shape[0]][rows]


class NF4Weight:
    """A weight in NF4, 4 bits and one float32 scale per 64 inputs, that multiplies as its float32 values do."""

    def __init__(self, codes: Tensor, scales: Tensor, library: Library) -> None:
        """codes: (O, H) uint8 below 16, scales: (O, H / 64) float32, as `nf4_parts` returns them."""
        self.shape = (codes.shape[0], codes.shape[1])
        self._library = library
        self._table = torch.tensor(_NF4, dtype=torch.float32)
        panels = _panels(codes, library.panel_f32)  # (P, outputs, H)
        pairs = panels[..., ::2] + panels[..., 1::2] * 16
        self._codes = pairs.permute(0, 2, 1).contiguous()  # [panel][pair of inputs][output]
        self._scales = _panels(scales, library.panel_f32).permute(0, 2, 1).contiguous()  # [panel][block][output]
        self.size_bytes = self._codes.nbytes + self._scales.nbytes

    def product(self, x: Tensor, bias: Tensor | None, ahead: Tensor | None = None) -> Tensor:
        """Return x W^T + bias (T, O) for x (T, H) float32 whose rows are contiguous."""
        num_out, num_in = self.shape
        y = torch.empty(x.shape[0], num_out)
        self._library.gemm_nf4(
            y.data_ptr(),
            x.data_ptr(),
            self._codes.data_ptr(),
            self._scales.data_ptr(),
            self._table.data_ptr(),
            _address(bias),
            *_list_address(ahead),
            x.shape[0],
            num_in,
            num_out,
            num_out,
            x.stride(0),
            self._library.num_threads,
        )
        return y

    def unpacked(self, rows: slice = _ALL) -> Tensor:
        """Return some rows of the weight, (O', H) float32, as this multiplies with them."""
        num_out, num_in = self.shape
        pairs = self._codes.permute(0, 2, 1).flatten(0, 1)[:num_out][rows]
        scales = self._scales.permute(0, 2, 1).flatten(0, 1)[:num_out][rows]
        both = torch.stack([self._table.repeat(16), self._table.repeat_interleave(16)], dim=1)  # Of every byte.
        blocks = both[pairs.to(torch.int32)].reshape(*scales.shape, _NF4_BLOCK)
        return (blocks * scales[..., None]).view(-1, num_in)


def nf4_parts(weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the codes (O, H) uint8 and scales (O, H / 64) float32 of a weight whose values NF4 holds exactly, or None.

    A block of NF4 always has a value of plus or minus its scale, because the scale was its largest value.
    """
    num_out, num_in = weight.shape
    if num_in % _NF4_BLOCK:
        return None
    table = torch.tensor(_NF4, dtype=torch.float32)
    blocks = weight.to(torch.float32).view(num_out, -1, _NF4_BLOCK)
    scales = blocks.abs().amax(dim=-1)
    middles = (table[1:] + table[:-1]) / 2
    codes = torch.bucketize(blocks / scales.clamp_min(torch.finfo(torch.float32).tiny)[..., None], middles)
    if not torch.equal(table[codes] * scales[..., None], blocks):
        return None
    return codes.to(torch.uint8).view(num_out, num_in), scales


class Int8Weight:
    """A weight in bytes with one float32 scale per `block_int8` inputs; see gemm_int8.c.

    The values of NF4 weights are the scale of their block times one of 16 numbers, of which the largest is 1; blocks of
    the same 64 inputs keep that scale exactly, and the 16 numbers are rounded to 1/127.
    """

    def __init__(self, weight: Tensor, library: Library) -> None:
        """Raises ValueError unless H is a multiple of the block."""
        num_in = weight.shape[1]
        if num_in % library.block_int8:
            raise ValueError(f"{num_in} inputs are no multiple of {library.block_int8}.")
        self.shape = (weight.shape[0], num_in)
        self._library = library
        panels = _panels(weight.to(torch.float32), library.panel_int8)  # (P, outputs, H)
        blocks = panels.view(*panels.shape[:2], -1, library.block_int8)
        scales = blocks.abs().amax(dim=-1) / _LARGEST_CODE
        codes = torch.round(blocks / scales.clamp_min(torch.finfo(torch.float32).tiny)[..., None])
        quads = (codes + _CODE_OFFSET).to(torch.uint8).view(panels.shape[0], -1, 16, num_in // 4, 4)
        self._codes = quads.permute(0, 3, 1, 2, 4).contiguous()  # [panel][quad of inputs][vector][output][4]
        self._scales = scales.permute(0, 2, 1).contiguous()  # [panel][block][output]
        self.size_bytes = self._codes.nbytes + self._scales.nbytes

    def product(self, x: Tensor, bias: Tensor | None, ahead: Tensor | None = None) -> Tensor:
        """Return x W^T + bias (T, O) for x (T, H) float32; x is rounded to 8 bits per block of inputs."""
        num_out, num_in = self.shape
        num_rows, num_blocks, num_threads = x.shape[0], num_in // self._library.block_int8, self._library.num_threads
        scratch = torch.empty(num_rows * (num_in + 8 * num_blocks), dtype=torch.uint8)
        codes = scratch.data_ptr()
        scales = codes + num_rows * num_in
        offsets = scales + 4 * num_rows * num_blocks
        self._library.quantize_rows(codes, scales, offsets, x.data_ptr(), num_rows, num_in, x.stride(0), num_threads)
        y = torch.empty(num_rows, num_out)
        self._library.gemm_int8(
            y.data_ptr(),
            codes,
            scales,
            offsets,
            self._codes.data_ptr(),
            self._scales.data_ptr(),
            _address(bias),
            *_list_address(ahead),
            num_rows,
            num_in,
            num_out,
            num_out,
            num_threads,
        )
        return y

    def unpacked(self, rows: slice = _ALL) -> Tensor:
        """Return some rows of the weight, (O', H) float32, as this multiplies with them."""
        num_out, num_in = self.shape
        codes = self._codes.permute(0, 2, 3, 1, 4).reshape(-1, num_in).to(torch.float32) - _CODE_OFFSET
        scales = self._scales.permute(0, 2, 1).reshape(codes.shape[0], -1)
        return (codes.view(*scales.shape, -1) * scales[..., None]).view(-1, num_in)[:num_out][rows].contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _list_address(ahead: Tensor | None) -> tuple[int, int]:
    """Return the address of a list (N, 2) and N."""
    return (0, 0) if ahead is None else (ahead.data_ptr(), ahead.shape[0])


def _panels(weight: Tensor, num_outputs: int) -> Tensor:
    """Cut a weight (O, H) into panels (P, num_outputs, H), the last one filled up with zeros."""
    num_missing = -weight.shape[0] % num_outputs
    return functional.pad(weight, (0, 0, 0, num_missing)).view(-1, num_outputs, weight.shape[1])
