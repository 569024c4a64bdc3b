"""Weights in NF4 multiply as the float32 values that bitsandbytes gives them, to the last bit."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import Tensor, nn

from server.kernels.native import FloatWeight, NF4Weight, nf4_parts
from server.products import pick_products
from tests.support.kernel_cases import largest_error
from tests.support.native import require_library

SIZES = [(1, 64), (47, 64), (48, 128), (49, 192), (200, 576), (97, 1536)]


def nf4_values(num_out: int, num_in: int, *, double: bool = True) -> Tensor:
    """Return float32 values of random NF4 weights (O, H), as the loader of the base makes them."""
    return rounded(torch.randn(num_out, num_in) * 0.02, double=double)


def rounded(weight: Tensor, *, double: bool = True) -> Tensor:
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=double)
    return dequantize_4bit(packed, state)


def pack(weight: Tensor) -> NF4Weight:
    parts = nf4_parts(weight)
    assert parts is not None
    return NF4Weight(*parts, require_library())


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(("num_out", "num_in"), SIZES)
def test_products_are_those_of_the_float32_values_to_the_last_bit(num_out: int, num_in: int, *, double: bool) -> None:
    weight = nf4_values(num_out, num_in, double=double)
    packed, plain = pack(weight), FloatWeight(weight, require_library())
    assert torch.equal(packed.unpacked(), weight)
    assert torch.equal(packed.unpacked(slice(num_out // 3, num_out // 2)), weight[num_out // 3 : num_out // 2])
    bias = torch.linspace(-1, 1, num_out)
    for num_rows in (1, 7, 8, 9, 33):
        x = torch.randn(num_rows, num_in)
        assert torch.equal(packed.product(x, bias), plain.product(x, bias))
        assert largest_error(packed.product(x, None), x.double() @ weight.double().t()) < 1e-5


def test_nf4_takes_a_seventh_of_the_memory() -> None:
    weight = nf4_values(576, 576)
    assert FloatWeight(weight, require_library()).size_bytes == 4 * 576 * 576
    assert pack(weight).size_bytes < weight.nbytes / 7


def test_a_block_of_zeros_and_blocks_of_one_sign_are_nf4() -> None:
    weight = torch.randn(3, 128)
    weight[0, :64] = 0
    weight[1], weight[2] = weight[1].abs(), -weight[2].abs()
    weight = rounded(weight, double=False)
    assert torch.equal(pack(weight).unpacked(), weight)


def test_what_nf4_does_not_hold_exactly_is_not_packed() -> None:
    weight = nf4_values(4, 128)
    moved = weight.clone()
    moved[2, 70] = torch.nextafter(moved[2, 70], torch.tensor(9.0))
    spoilt = weight.clone()
    spoilt[1, 3] = float("nan")
    for other in (torch.randn(4, 128), moved, spoilt, weight[:, :96]):
        assert nf4_parts(other) is None


def test_a_base_in_nf4_is_multiplied_in_nf4_and_others_are_not() -> None:
    require_library()
    layers = [nn.Linear(64, 8, bias=False).requires_grad_(False) for _ in range(2)]
    for layer in layers:
        layer.weight.copy_(nf4_values(8, 64))
    x = torch.randn(3, 64)
    wanted = [layer(x) for layer in layers]
    product = pick_products("float32", device="cpu")(layers)
    assert largest_error(product(x), torch.cat(wanted, dim=1).double()) < 1e-6
    assert torch.equal(product.weight(), torch.cat([layer.weight for layer in layers]))


@pytest.mark.parametrize("num_rows", [1, 9])
def test_memory_fetched_ahead_changes_nothing(num_rows: int) -> None:
    packed = pack(nf4_values(200, 128))
    x = torch.randn(num_rows, 128)
    memory = [torch.randn(num_floats) for num_floats in (16, 1, 4000, 100_000)]
    reads = torch.tensor([[one.data_ptr(), -(-one.nbytes // 64)] for one in memory])
    for ahead in (reads, reads[:1], reads[:0]):
        assert torch.equal(packed.product(x, None, ahead), packed.product(x, None))
