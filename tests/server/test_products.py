"""Every way to multiply with the frozen weights gives the numbers of the base, or says that it rounds."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from adapterhub.base.identity import Base
from adapterhub.base.loading import load_model
from adapterhub.errors import UserInputError
from server.layers import find_groups
from server.products import Compute, PackedHead, Product, linear_bias, linear_weight, pick_products
from tests.support.kernel_cases import largest_error
from tests.support.native import require_library
from tests.support.tiny_models import build_base

LOGGER = "server.products"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A base in four bits, with biases at some linears."""
    return build_base(tmp_path_factory.mktemp("base"), "qwen2", quantization="nf4")


def linears(base: Base, *, keep_quantized: bool = False) -> list[list[nn.Linear]]:
    model = load_model(base, keep_quantized=keep_quantized)
    groups = find_groups(model, base.modules)
    return [[layer for name in names if isinstance(layer := model.get_submodule(name), nn.Linear)] for names in groups]


def without_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.products.find_library", lambda: None)


def joined(layers: Sequence[nn.Linear], x: Tensor) -> Tensor:
    """Multiply with every layer in float64, side by side."""
    found: list[Tensor] = []
    for layer in layers:
        bias = linear_bias(layer)
        product = x.double() @ linear_weight(layer).double().t()
        found.append(product if bias is None else product + bias.double())
    return torch.cat(found, dim=1)


def check(product: Product, layers: Sequence[nn.Linear], *, bound: float = 1e-6) -> Tensor:
    x = torch.randn(7, layers[0].in_features, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = product(x)
    assert largest_error(found, joined(layers, x)) < bound
    return found


def test_packed_plain_and_four_bit_linears_give_the_same_numbers(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    require_library()
    plain, four_bit = linears(base), linears(base, keep_quantized=True)
    assert {type(layer).__name__ for group in four_bit for layer in group} == {"Linear4bit"}
    assert any(layer.bias is not None for group in plain for layer in group)
    compiled = pick_products("float32", device="cpu")
    packed = [compiled(group) for group in plain]
    kept = [compiled(group) for group in four_bit]
    without_library(monkeypatch)
    by_torch = [pick_products("float32", device="cpu")(group) for group in plain]
    kept_by_torch = [pick_products("float32", device="cpu")(group) for group in four_bit]
    for idx, group in enumerate(plain):
        weight = torch.cat([linear_weight(layer) for layer in group])
        for product in (packed[idx], kept[idx], by_torch[idx], kept_by_torch[idx]):
            check(product, group)
            assert torch.equal(product.weight(), weight)


def test_int8_stays_near_and_keeps_the_scales_of_four_bit_weights(base: Base) -> None:
    require_library()
    build = pick_products("int8", device="cpu")
    for group in linears(base):
        product = build(group)
        check(product, group, bound=0.02)
        weight = torch.cat([linear_weight(layer) for layer in group])
        assert largest_error(product.weight(), weight.double()) < 0.5 / 127


@pytest.mark.parametrize("is_compiled", [True, False])
def test_members_with_and_without_bias_stand_side_by_side(is_compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if is_compiled:
        require_library()
    else:
        without_library(monkeypatch)
    torch.manual_seed(0)
    for biases in ((True, False, True), (False, False, False), (True, True, True)):
        sizes = zip((50, 3, 1), biases, strict=True)
        layers = [nn.Linear(24, width, bias=bias).requires_grad_(False) for width, bias in sizes]
        check(pick_products("float32", device="cpu")(layers), layers)


def test_a_packed_product_takes_inputs_whose_numbers_lie_apart() -> None:
    require_library()
    torch.manual_seed(0)
    layer = nn.Linear(64, 50).requires_grad_(False)
    x = torch.randn(64, 9).t()
    for compute in ("float32", "int8"):
        product = pick_products(compute, device="cpu")([layer])
        assert torch.equal(product(x), product(x.contiguous()))


def test_the_head_keeps_the_shape_of_its_input() -> None:
    layer = nn.Linear(24, 50, bias=False).requires_grad_(False)
    head = PackedHead(pick_products("float32", device="cpu")([layer]))
    for shape in ((24,), (3, 24), (1, 3, 24), (2, 3, 24)):
        x = torch.randn(shape)
        assert head(x).shape == (*shape[:-1], 50)
        assert largest_error(head(x), layer(x).double()) < 1e-6


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_int8_is_refused_where_it_cannot_be_computed(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without_library(monkeypatch)
    with pytest.raises(UserInputError) as caught:
        pick_products("int8", device=device)
    assert str(caught.value) == (
        f"This server cannot compute in int8 on {device!r}: it needs the compiled kernels, which run on a CPU. "
        "Serve with --compute float32, or install the package ziglang on Linux."
    )


@pytest.mark.parametrize(
    ("compute", "has_library", "message"),
    [
        ("float32", True, "products in float32 by compiled kernels"),
        ("int8", True, "products in int8 by compiled kernels"),
        ("float32", False, "products in float32 by torch, device 'cpu'"),
    ],
)
def test_the_choice_is_logged(
    compute: Compute,
    has_library: bool,
    message: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(require_library(), "has_vnni", True)
    if not has_library:
        without_library(monkeypatch)
    with caplog.at_level(logging.INFO, logger=LOGGER):
        pick_products(compute, device="cpu")
    assert caplog.messages == [message]


def test_int8_warns_about_a_processor_that_gains_nothing_from_it(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(require_library(), "has_vnni", False)
    pick_products("int8", device="cpu")
    assert caplog.messages == ["this processor does not multiply bytes directly; int8 may be slower than float32 here"]


def test_int8_leaves_linears_without_whole_blocks_in_float32_and_says_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(require_library(), "has_vnni", True)
    layer = nn.Linear(100, 30).requires_grad_(False)
    product = pick_products("int8", device="cpu")([layer])
    check(product, [layer])
    assert torch.equal(product.weight(), layer.weight)
    assert caplog.messages == ["a linear with 100 inputs stays in float32: no multiple of 64"]
