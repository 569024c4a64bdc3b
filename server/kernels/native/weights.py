"""Weights packed for products with few rows, in float32 or in 8-bit integers, and the products.

Knows tensors. A row's product does not depend on how many rows there are, to the last bit: every sum runs in one order.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from server.kernels.native.library import Library

__all__ = ["FloatWeight", "Int8Weight", "PackedWeight"]

_LARGEST_CODE = 127  # Signed bytes without -128, so that codes are symmetric.
_CODE_OFFSET = 128


class PackedWeight(Protocol):
    """One weight (O, H) that is kept in packed form only."""

    shape: tuple[int, int]
    size_bytes: int

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x W^T + bias (T, O) for x (T, H) float32 whose rows are contiguous."""
        ...

    def unpacked(self) -> Tensor:
        """Return the weight (O, H) float32 this multiplies with."""
        ...


class FloatWeight:
    """A weight in float32, in panels that lie [panel][input][output]; see gemm_f32.c."""

    def __init__(self, weight: Tensor, library: Library) -> None:
        self.shape = (weight.shape[0], weight.shape[1])
        self._library = library
        self._panels = _panels(weight.to(torch.float32), library.panel_f32).permute(0, 2, 1).contiguous()
        self.size_bytes = self._panels.nbytes

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x W^T + bias (T, O) for x (T, H) float32 whose rows are contiguous."""
        num_out, num_in = self.shape
        y = torch.empty(x.shape[0], num_out)
        self._library.gemm_f32(
            y.data_ptr(),
            x.data_ptr(),
            self._panels.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            x.shape[0],
            num_in,
            num_out,
            num_out,
            x.stride(0),
            self._library.num_threads,
        )
        return y

    def unpacked(self) -> Tensor:
        """Return the weight (O, H) float32 this multiplies with."""
        return self._panels.permute(0, 2, 1).reshape(-1, self.shape[1])[: self.shape[0]]


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

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
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
            0 if bias is None else bias.data_ptr(),
            num_rows,
            num_in,
            num_out,
            num_out,
            num_threads,
        )
        return y

    def unpacked(self) -> Tensor:
        """Return the weight (O, H) float32 this multiplies with."""
        num_out, num_in = self.shape
        codes = self._codes.permute(0, 2, 3, 1, 4).reshape(-1, num_in).to(torch.float32) - _CODE_OFFSET
        scales = self._scales.permute(0, 2, 1).reshape(codes.shape[0], -1)
        return (codes.view(*scales.shape, -1) * scales[..., None]).view(-1, num_in)[:num_out].contiguous()


def _panels(weight: Tensor, num_outputs: int) -> Tensor:
    """Cut a weight (O, H) into panels (P, num_outputs, H), the last one filled up with zeros."""
    num_missing = -weight.shape[0] % num_outputs
    return functional.pad(weight, (0, 0, 0, num_missing)).view(-1, num_outputs, weight.shape[1])
