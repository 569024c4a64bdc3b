"""Packed weights multiply as float64 does, within a bound from the formula, and every row as if it were alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from server.kernels.native import FloatWeight, Int8Weight, Library, PackedWeight
from tests.support.native import require_library

KINDS = {"float32": FloatWeight, "int8": Int8Weight}
ODD_OUTPUTS = (1, 31, 33, 47, 48, 49, 97, 200, 400)
NUM_ROWS = (1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17, 32, 33)
# The 16 numbers of NF4, https://arxiv.org/abs/2305.14314, appendix E.
NF4 = torch.tensor(
    [
        *(-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0),
        *(0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0),
    ]
)
HALF_A_CODE = 0.5001  # Rounding to the nearest code, and the float32 error of the division before it.
FLOAT_ERROR = 2**-23


@pytest.fixture(scope="module")
def library() -> Library:
    return require_library()


@pytest.fixture(autouse=True)
def _one_thread_afterwards() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def build(kind: str, weight: Tensor, library: Library) -> PackedWeight:
    return KINDS[kind](weight, library)


def per_block(values: Tensor, num_inputs: int) -> Tensor:
    return values.reshape(values.shape[0], -1, num_inputs)


def int8_bound(x: Tensor, weight: Tensor, packed: Tensor, block: int) -> Tensor:
    """Return the largest error (T, O): half a code of every activation and weight, times what it is multiplied with.

    x W = sum (x' + dx)(w' + dw), with |dx| <= half a code of its block; so |x W - x' w'| <= sum |dx| |w'| + |x| |dw|.
    """
    blocks_x, blocks_w, blocks_packed = (per_block(one.double().abs(), block) for one in (x, weight, packed))
    half_x = blocks_x.amax(dim=2) / 127 * HALF_A_CODE
    half_w = blocks_w.amax(dim=2) / 127 * HALF_A_CODE
    rounding = half_x @ blocks_packed.sum(dim=2).t() + blocks_x.sum(dim=2) @ half_w.t()
    return rounding + 8 * FLOAT_ERROR * (x.double().abs() @ weight.double().abs().t()) + FLOAT_ERROR


@pytest.mark.parametrize("num_out", ODD_OUTPUTS)
@pytest.mark.parametrize("num_in", [1, 7, 64, 130])
def test_a_float_weight_multiplies_as_float64_does(num_out: int, num_in: int, library: Library) -> None:
    torch.manual_seed(num_out)
    weight, bias = torch.randn(num_out, num_in), torch.randn(num_out)
    packed = FloatWeight(weight, library)
    for num_rows in NUM_ROWS:
        x = torch.randn(num_rows, num_in)
        for added in (None, bias):
            exact = x.double() @ weight.double().t() + (0 if added is None else added.double())
            bound = FLOAT_ERROR * (num_in + 1) * (x.double().abs() @ weight.double().abs().t() + exact.abs() + 1)
            assert ((packed.product(x, added).double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("num_out", ODD_OUTPUTS)
@pytest.mark.parametrize("num_in", [64, 192])
def test_an_int8_weight_is_off_by_no_more_than_half_a_code_per_number(
    num_out: int, num_in: int, library: Library
) -> None:
    torch.manual_seed(num_out)
    weight, bias = torch.randn(num_out, num_in), torch.randn(num_out)
    packed = Int8Weight(weight, library)
    for num_rows in NUM_ROWS:
        x = torch.randn(num_rows, num_in)
        bound = int8_bound(x, weight, packed.unpacked(), library.block_int8)
        for added in (None, bias):
            exact = x.double() @ weight.double().t() + (0 if added is None else added.double())
            assert ((packed.product(x, added).double() - exact).abs() <= bound + FLOAT_ERROR * exact.abs()).all()


def test_int8_keeps_small_blocks_beside_large_ones(library: Library) -> None:
    """Every 64 inputs have a scale of their own: an outlier costs its own block alone."""
    torch.manual_seed(0)
    x, weight = torch.randn(5, 192), torch.randn(40, 192)
    x[:, 64:128] *= 1e-3
    weight[:, :64] *= 1e-6
    weight[:, 128:] = 0
    exact = x.double() @ weight.double().t()
    error = (Int8Weight(weight, library).product(x, None).double() - exact).abs().max()
    assert error < 0.02 * exact.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_may_lie_apart(kind: str, library: Library) -> None:
    torch.manual_seed(0)
    wide = torch.randn(9, 200)
    packed = build(kind, torch.randn(70, 128), library)
    assert torch.equal(packed.product(wide[:, 32:160], None), packed.product(wide[:, 32:160].contiguous(), None))
    assert torch.equal(packed.product(wide[::2, :128], None), packed.product(wide[::2, :128].contiguous(), None))


@pytest.mark.parametrize("num_out", ODD_OUTPUTS)
def test_a_float_weight_comes_back_as_it_was(num_out: int, library: Library) -> None:
    weight = torch.randn(num_out, 37)
    packed = FloatWeight(weight, library)
    assert packed.shape == (num_out, 37)
    assert torch.equal(packed.unpacked(), weight)
    assert packed.size_bytes >= weight.nbytes


def test_a_half_precision_weight_is_packed_as_float32(library: Library) -> None:
    weight = torch.randn(20, 64).to(torch.bfloat16)
    assert torch.equal(FloatWeight(weight, library).unpacked(), weight.float())


@pytest.mark.parametrize("num_out", ODD_OUTPUTS)
def test_an_int8_weight_comes_back_as_the_nearest_codes(num_out: int, library: Library) -> None:
    torch.manual_seed(num_out)
    weight = torch.randn(num_out, 128)
    weight[0, 64:] = 0
    packed = Int8Weight(weight, library)
    blocks = per_block(weight, library.block_int8)
    scales = blocks.abs().amax(dim=2, keepdim=True) / 127
    codes = torch.where(scales > 0, (blocks / scales).round(), 0)
    assert codes.abs().max() == 127
    assert packed.shape == (num_out, 128)
    assert torch.equal(packed.unpacked(), (codes * scales).reshape(num_out, 128))
    assert packed.size_bytes < weight.nbytes or num_out < library.panel_int8


def test_nf4_values_keep_the_scale_of_their_block(library: Library) -> None:
    torch.manual_seed(0)
    picked = torch.randint(16, (50, 3, 64))
    picked[..., 0] = torch.tensor([0, 15])[torch.randint(2, (50, 3))]  # The largest value of a block is its scale.
    scales = torch.rand(50, 3, 1) + 0.01
    weight = (NF4[picked] * scales).view(50, 192)
    unpacked = Int8Weight(weight, library).unpacked()
    found = per_block(unpacked, 64).abs().amax(dim=2, keepdim=True)
    assert torch.allclose(found, scales, rtol=FLOAT_ERROR, atol=0)
    assert torch.equal((per_block(unpacked, 64) / scales * 127).round(), (NF4 * 127).round()[picked])
    assert torch.equal(Int8Weight(unpacked, library).unpacked(), unpacked)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_not_finite_stays_visible_in_its_row_alone(kind: str, poison: float, library: Library) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(50, 128), torch.randn(11, 128)
    packed = build(kind, weight, library)
    clean = packed.product(x, None)
    for column in (0, 63, 127):
        for row in (0, 4, 10):
            broken = x.clone()
            broken[row, column] = poison
            found = packed.product(broken, None)
            assert not found[row].isfinite().any()
            others = [other for other in range(11) if other != row]
            assert torch.equal(found[others], clean[others])


def test_int8_gives_zero_for_zeros_and_nothing_wild_for_tiny_numbers(library: Library) -> None:
    torch.manual_seed(0)
    weight = torch.randn(40, 128)
    packed = Int8Weight(weight, library)
    for size in (0.0, 1e-45, 1e-40, 1e-38, 1e-36):
        found = packed.product(torch.full((3, 128), size), None)
        assert (found.abs() <= 128 * size * weight.abs().max() + torch.finfo(torch.float32).tiny).all()
    assert torch.equal(Int8Weight(torch.zeros(40, 128), library).product(weight, None), torch.zeros(40, 40))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_out", [33, 250, 1000])
def test_a_row_gets_the_same_bits_in_every_batch(kind: str, num_out: int, library: Library) -> None:
    torch.manual_seed(num_out)
    packed = build(kind, torch.randn(num_out, 192), library)
    x, bias = torch.randn(33, 192), torch.randn(num_out)
    whole = packed.product(x, bias)
    for num_rows in range(1, 33):
        first = torch.randint(33 - num_rows, ()).item()
        assert torch.equal(packed.product(x[first : first + num_rows], bias), whole[first : first + num_rows])
    order = torch.randperm(33)
    assert torch.equal(packed.product(x[order], bias), whole[order])


@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_threads_changes_no_bit(kind: str, library: Library) -> None:
    torch.manual_seed(0)
    packed = build(kind, torch.randn(1000, 192), library)
    x = torch.randn(37, 192)
    found: list[Tensor] = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        found.append(packed.product(x, None))
    assert torch.equal(found[1], found[0])
    assert torch.equal(found[2], found[0])


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows_give_no_rows(kind: str, library: Library) -> None:
    assert build(kind, torch.randn(5, 64), library).product(torch.empty(0, 64), None).shape == (0, 5)


def test_int8_needs_whole_blocks_of_inputs(library: Library) -> None:
    with pytest.raises(ValueError, match=r"^100 inputs are no multiple of 64\.$"):
        Int8Weight(torch.randn(8, 100), library)
