"""Linears that read one input are computed together, and nobody can tell from the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from adapterhub.base.loading import load_model
from adapterhub.errors import AdapterMismatchError
from server.kernels import Segments, SlotWeights, load_kernel
from server.layers import AdapterLinear, LinearGroup, find_groups, serving_bias, serving_weight, wrap_linears
from server.products import pick_products
from server.step_context import StepContext, step_context
from tests.support.kernel_cases import CPU_KERNELS, Case, exact, largest_error
from tests.support.rows import prompt
from tests.support.tiny_models import FAMILIES, build_base

NUM_IN, WIDTHS = 12, (20, 8, 5)
GROUPED = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
GROUPS = dict.fromkeys(FAMILIES, GROUPED) | {
    "phi": [["q_proj", "k_proj", "v_proj"], ["dense"], ["fc1"], ["fc2"]],
    "phi3": [["qkv_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]],
}


class Counter:
    """A product that counts its calls."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.num_calls = 0
        self._inner = pick_products("float32", device="cpu")(layers)

    def __call__(self, x: Tensor, ahead: Tensor | None = None) -> Tensor:
        self.num_calls += 1
        return self._inner(x, ahead)

    def weight(self, rows: slice = slice(None)) -> Tensor:
        return self._inner.weight(rows)


def build_layers(*, biases: Sequence[bool] = (True, False, True)) -> list[nn.Linear]:
    torch.manual_seed(0)
    layers = [nn.Linear(NUM_IN, width, bias=bias) for width, bias in zip(WIDTHS, biases, strict=True)]
    return [layer.requires_grad_(False) for layer in layers]


def build_group(layers: Sequence[nn.Linear], *, kernel: str = "cpu") -> tuple[list[AdapterLinear], Counter]:
    product = Counter(layers)
    group = LinearGroup(
        product,
        [layer.out_features for layer in layers],
        biases=[layer.bias for layer in layers],
        num_slots=3,
        kernel=load_kernel(kernel),
    )
    return [AdapterLinear(group, idx) for idx in range(len(layers))], product


def lora(num_out: int, **scales: Tensor) -> SlotWeights:
    return SlotWeights(a=torch.randn(3, NUM_IN), b=torch.randn(num_out, 3), **scales)


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert largest_error(found, expected.double()) < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_linears_of_one_input_are_grouped_and_answer_as_before(family: str, tmp_path: Path) -> None:
    base = build_base(tmp_path, family)
    plain, model = load_model(base), load_model(base)
    groups = find_groups(model, base.modules)
    leaves = [[name.rpartition(".")[2] for name in group] for group in groups]
    assert leaves == GROUPS[family] * 2
    assert all(len({name.split(".")[2] for name in group}) == 1 for group in groups), "a group spans two layers"
    wrapped = wrap_linears(
        model,
        base.modules,
        num_slots=1,
        kernel=load_kernel("cpu"),
        build_product=pick_products("float32", device="cpu"),
    )
    assert set(wrapped) == set(base.modules)
    token_ids = torch.tensor([prompt(20, seed=1)])
    with torch.inference_mode():
        for step in (StepContext(), StepContext(Segments((-1, 0), (9, 11)))):
            with step_context(step):
                found = model(input_ids=token_ids, use_cache=False).logits
            assert_close(found, plain(input_ids=token_ids, use_cache=False).logits)
    for name, layer in wrapped.items():
        before = plain.get_submodule(name)
        assert isinstance(before, nn.Linear)
        assert torch.equal(serving_weight(layer), serving_weight(before))
        bias, bias_before = serving_bias(layer), serving_bias(before)
        assert (bias is None) == (bias_before is None)
        assert bias is None or bias_before is None or torch.equal(bias, bias_before)


def test_a_name_that_is_no_linear_is_refused(tmp_path: Path) -> None:
    model = load_model(build_base(tmp_path))
    for name, found in (("model.layers.7.self_attn.q_proj", "nothing"), ("model.norm", "a LlamaRMSNorm")):
        with pytest.raises(AdapterMismatchError) as caught:
            find_groups(model, [name])
        assert str(caught.value) == (
            f"The base lists a linear {name!r}, but the loaded model has {found} there. "
            "Serve a decoder model whose projections are plain linears."
        )


def test_a_linear_that_runs_twice_in_a_pass_belongs_to_no_group(tmp_path: Path) -> None:
    base = build_base(tmp_path)
    model = load_model(base)
    model.model.layers[1].self_attn = model.model.layers[0].self_attn
    names = [name for name in base.modules if name.startswith("model.layers.0")]
    assert find_groups(model, names) == [[name] for name in names]


def test_a_step_without_adapters_is_exactly_the_base_layer() -> None:
    layer = nn.Linear(NUM_IN, WIDTHS[0]).requires_grad_(False)
    product = pick_products("float32", device="cpu")([layer])
    group = LinearGroup(product, [WIDTHS[0]], biases=[layer.bias], num_slots=2, kernel=load_kernel("cpu"))
    wrapped = AdapterLinear(group, 0)
    wrapped.write_slot(1, SlotWeights(out_scale=torch.zeros(WIDTHS[0])))
    x = torch.randn(1, 3, NUM_IN)
    expected = product(x[0])[None]
    assert_close(expected, layer(x))
    for step in (StepContext(None), StepContext(Segments((-1, 0), (2, 1)))):
        with step_context(step):
            assert torch.equal(wrapped(x), expected)
    assert torch.equal(wrapped(x), expected)


def test_members_asked_with_one_tensor_share_a_product() -> None:
    layers = build_layers()
    members, product = build_group(layers)
    for num_passes in (1, 2):
        x = torch.randn(1, 4, NUM_IN)
        for member, layer in zip(members, layers, strict=True):
            assert_close(member(x), layer(x))
        assert product.num_calls == num_passes


def test_a_tensor_that_is_only_equal_is_computed_afresh() -> None:
    layers = build_layers()
    members, product = build_group(layers)
    x = torch.randn(1, 4, NUM_IN)
    for member, layer in zip(members, layers, strict=True):
        copy = x.clone()
        assert_close(member(copy), layer(x))
    assert product.num_calls == 3
    first = members[0](x)
    assert_close(members[1](x + 1), layers[1](x + 1))
    assert_close(members[2](x), layers[2](x))
    assert_close(first, layers[0](x))


def test_inputs_may_have_any_number_of_dimensions() -> None:
    layers = build_layers()
    members, _ = build_group(layers)
    for shape in ((NUM_IN,), (4, NUM_IN), (2, 3, NUM_IN), (1, 2, 3, NUM_IN)):
        x = torch.randn(shape)
        for member, layer in zip(members, layers, strict=True):
            assert_close(member(x), layer(x))
    x = torch.randn(NUM_IN, 4).t()
    assert_close(members[0](x), layers[0](x))


def test_a_pass_that_failed_halfway_leaves_nothing_to_the_next() -> None:
    layers = build_layers()
    members, _ = build_group(layers)
    members[0].write_slot(0, SlotWeights(out_scale=torch.zeros(WIDTHS[0])))
    x = torch.randn(1, 4, NUM_IN)
    with step_context(StepContext(Segments((0,), (4,)))):
        assert not members[0](x).any()  # Here the pass ends, before the other members were asked.
    for member, layer in zip(members, layers, strict=True):
        assert_close(member(x), layer(x))
    members[0](x)
    members[0].write_slot(0, None)
    x += 1  # The same object with other numbers in it.
    assert_close(members[0](x), layers[0](x))


@pytest.mark.parametrize("kernel", CPU_KERNELS)
def test_every_member_gets_what_its_slots_say(kernel: str) -> None:
    """The slots scale no input, the input of one member, or those of two in different ways."""
    layers = build_layers()
    members, _ = build_group(layers, kernel=kernel)
    torch.manual_seed(1)
    slots = [
        (lora(20), None, lora(5)),
        (None, SlotWeights(in_scale=torch.randn(NUM_IN)), lora(5, out_scale=torch.randn(5))),
        (lora(20, in_scale=torch.randn(NUM_IN)), SlotWeights(in_scale=torch.randn(NUM_IN)), None),
    ]
    for slot, column in enumerate(slots):
        for member, weights in zip(members, column, strict=True):
            member.write_slot(slot, weights)
    assert [member.slots for member in members] == list(zip(*slots, strict=True))
    segments = Segments((0, -1, 1, 2, 0), (2, 1, 3, 1, 1))
    for used in (segments, replace(segments, owner=(0, -1, -1, 0, 0)), replace(segments, owner=(1,) * 5)):
        x = torch.randn(1, 8, NUM_IN)
        with step_context(StepContext(used)):
            found = torch.cat([member(x) for member in members], dim=-1)[0]
        assert_close(found, expected_outputs(layers, members, x[0], used))


def expected_outputs(
    layers: Sequence[nn.Linear], members: Sequence[AdapterLinear], x: Tensor, segments: Segments
) -> Tensor:
    """Apply the formula in float64: scale the inputs of each member, multiply, then add what the adapters add."""
    columns = tuple(member.slots for member in members)
    nothing = Case(x, torch.empty(x.shape[0], sum(WIDTHS)), segments, WIDTHS, columns)
    _, inputs = exact(nothing)
    products = [
        nn.functional.linear(u, layer.weight.double(), None if layer.bias is None else layer.bias.double())
        for u, layer in zip(inputs, layers, strict=True)
    ]
    return exact(replace(nothing, y=torch.cat(products, dim=1)))[0]


def test_a_slot_that_no_longer_scales_its_input_is_forgotten() -> None:
    layers = build_layers()
    members, product = build_group(layers)
    segments = Segments((0,), (4,))
    members[1].write_slot(0, SlotWeights(in_scale=torch.randn(NUM_IN)))
    members[2].write_slot(0, lora(5))
    for weights, num_calls in ((members[1].slots[0], 3), (lora(8), 1), (None, 1)):
        members[1].write_slot(0, weights)
        x, before = torch.randn(1, 4, NUM_IN), product.num_calls
        with step_context(StepContext(segments)):
            found = torch.cat([member(x) for member in members], dim=-1)[0]
        assert_close(found, expected_outputs(layers, members, x[0], segments))
        assert product.num_calls - before == num_calls
