"""Products with the frozen weights of the base: x W^T + bias for one linear, or for several that read the same x.

On a CPU the weights are packed for the compiled kernels and the original copies are dropped. 4-bit layers of a GPU stay
what they are. Knows tensors and layers of torch. Does not know adapters, slots or steps.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from adapterhub.errors import UserInputError
from server.kernels.native import FloatWeight, Int8Weight, Library, NF4Weight, PackedWeight, find_library, nf4_parts

__all__ = ["Compute", "PackedHead", "Product", "ProductBuilder", "linear_bias", "linear_weight", "pick_products"]

_log = logging.getLogger(__name__)

_ALL = slice(None)

Compute = Literal["float32", "int8"]


class Product(Protocol):
    """The product of one group of linears."""

    def __call__(self, x: Tensor, ahead: Tensor | None = None) -> Tensor:
        """Return a fresh x W^T + bias (T, O) for x (T, H) float32; ahead: see `server.kernels.base.Kernel.reads`."""
        ...

    def weight(self, rows: slice = _ALL) -> Tensor:
        """Return some rows of the weight, (O', H) float32, as this multiplies with them."""
        ...


ProductBuilder = Callable[[Sequence[nn.Linear]], Product]


def _is_linear4bit(layer: nn.Module) -> bool:
    # By name: importing bitsandbytes only to ask costs seconds, and the layer exists only when it is already imported.
    return any(kind.__name__ == "Linear4bit" for kind in type(layer).__mro__)


def linear_weight(layer: nn.Module) -> Tensor:
    """Return the weight (O, H) float32 of a plain or a 4-bit linear, dequantized."""
    weight = cast("Tensor", layer.weight)
    if _is_linear4bit(layer):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, cast("Any", weight).quant_state).to(torch.float32)
    return weight.data.to(torch.float32)


def linear_bias(layer: nn.Module) -> Tensor | None:
    """Return the bias (O,) float32 of a linear, or None."""
    bias = cast("Tensor | None", layer.bias)
    return None if bias is None else bias.data.to(torch.float32)


class _PackedProduct:
    def __init__(self, packed: PackedWeight, bias: Tensor | None) -> None:
        self._packed = packed
        self._bias = bias

    def __call__(self, x: Tensor, ahead: Tensor | None = None) -> Tensor:
        return self._packed.product(x if x.stride(1) == 1 else x.contiguous(), self._bias, ahead)

    def weight(self, rows: slice = _ALL) -> Tensor:
        return self._packed.unpacked(rows)


class _TorchProduct:
    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self._weight = torch.cat([linear_weight(layer) for layer in layers])
        self._bias = _joined_bias(layers)

    def __call__(self, x: Tensor, ahead: Tensor | None = None) -> Tensor:
        del ahead
        return functional.linear(x, self._weight, self._bias)

    def weight(self, rows: slice = _ALL) -> Tensor:
        return self._weight[rows]


class _FourBitProduct:
    """Layers that unpack their weights at every call, one after the other."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self._layers = layers
        for layer in layers:
            # On CPUs with AVX512-BF16 the first call without gradients would repack the weight and round its scales to
            # bfloat16, so that serving and training see different values (bitsandbytes 0.50, nn/modules.py).
            setattr(layer, "support_avx512bf16_for_cpu", False)  # noqa: B010  # pyright sees only nn.Module here.

    def __call__(self, x: Tensor, ahead: Tensor | None = None) -> Tensor:
        del ahead
        found = [layer(x) for layer in self._layers]
        return found[0] if len(found) == 1 else torch.cat(found, dim=-1)

    def weight(self, rows: slice = _ALL) -> Tensor:
        return torch.cat([linear_weight(layer) for layer in self._layers])[rows]


class PackedHead(nn.Module):
    """The linear from hidden states to logits, with a packed weight; it takes no adapters."""

    def __init__(self, product: Product) -> None:
        super().__init__()
        self._product = product

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (..., V) for x (..., H) float32."""
        return self._product(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)


def pick_products(compute: Compute, *, device: str) -> ProductBuilder:
    """Return what builds products for a device type; logs the choice.

    compute: "float32" multiplies with the values of the base as they are, "int8" rounds weights and activations to
    bytes with a scale per block of inputs. Raises UserInputError where int8 cannot be computed.
    """
    library = find_library() if device == "cpu" else None
    if compute == "int8" and library is None:
        raise UserInputError(
            f"This server cannot compute in int8 on {device!r}: it needs the compiled kernels, which run on a CPU.",
            "Serve with --compute float32, or install the package ziglang on Linux.",
        )
    if library is None:
        _log.info("products in float32 by torch, device %r", device)
        return _build_plain
    if compute == "int8" and not library.has_vnni:
        _log.warning("this processor does not multiply bytes directly; int8 may be slower than float32 here")
    _log.info("products in %s by compiled kernels", compute)
    return lambda layers: _build_packed(layers, compute, library)


def _build_plain(layers: Sequence[nn.Linear]) -> Product:
    return _FourBitProduct(layers) if any(_is_linear4bit(layer) for layer in layers) else _TorchProduct(layers)


def _build_packed(layers: Sequence[nn.Linear], compute: Compute, library: Library) -> Product:
    if any(_is_linear4bit(layer) for layer in layers):
        return _FourBitProduct(layers)
    weight = torch.cat([linear_weight(layer) for layer in layers])
    if compute == "int8" and weight.shape[1] % library.block_int8 == 0:
        return _PackedProduct(Int8Weight(weight, library), _joined_bias(layers))
    if compute == "int8":
        _log.warning("a linear with %d inputs stays in float32: no multiple of %d", weight.shape[1], library.block_int8)
    parts = nf4_parts(weight)
    packed = FloatWeight(weight, library) if parts is None else NF4Weight(*parts, library)
    return _PackedProduct(packed, _joined_bias(layers))


def _joined_bias(layers: Sequence[nn.Linear]) -> Tensor | None:
    biases = [linear_bias(layer) for layer in layers]
    if all(bias is None for bias in biases):
        return None
    zeros = [torch.zeros(layer.out_features, device=layer.weight.device) for layer in layers]
    return torch.cat([zero if bias is None else bias for bias, zero in zip(biases, zeros, strict=True)])
