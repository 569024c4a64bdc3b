from __future__ import annotations

import logging
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterhub.errors import SettingsError
from server.kernels import KERNELS, Kernel, Member, Segments, SlotWeights, pick_kernel
from server.layers import AdapterLinear
from server.step_context import StepContext, current_step, step_context

NUM_IN, NUM_OUT = 12, 20
KINDS = ("none", "lora", "dora", "ia3-output", "ia3-input", "vera", "everything")


def build_slot(kind: str, rank: int, *, shared: SlotWeights) -> SlotWeights | None:
    a, b = torch.randn(rank, NUM_IN), torch.randn(NUM_OUT, rank)
    match kind:
        case "lora":
            return SlotWeights(a=a, b=b)
        case "dora":
            return SlotWeights(a=a, b=b, out_scale=torch.randn(NUM_OUT), out_shift=torch.randn(NUM_OUT))
        case "ia3-output":
            return SlotWeights(out_scale=torch.randn(NUM_OUT))
        case "ia3-input":
            return SlotWeights(in_scale=torch.randn(NUM_IN))
        case "vera":
            assert shared.a is not None
            scale = torch.randn(shared.a.shape[0])
            return SlotWeights(a=shared.a, b=shared.b, rank_scale=scale, delta_scale=torch.randn(NUM_OUT))
        case "everything":
            return SlotWeights(
                a=a,
                b=b,
                rank_scale=torch.randn(rank),
                delta_scale=torch.randn(NUM_OUT),
                out_scale=torch.randn(NUM_OUT),
                out_shift=torch.randn(NUM_OUT),
                in_scale=torch.randn(NUM_IN),
            )
    return None


def formula(x: torch.Tensor, layer: torch.nn.Linear, owners: Sequence[int], slots: Sequence[SlotWeights | None]):
    """The formula in float64, written token by token from the table in `server.kernels.base`."""
    weight, bias = layer.weight.double(), layer.bias.double()
    result = []
    for row, owner in zip(x.double(), owners, strict=True):
        entry = slots[owner] if owner >= 0 else None
        entry = entry or SlotWeights()
        u = row if entry.in_scale is None else row * entry.in_scale.double()
        y = weight @ u + bias
        if entry.a is not None and entry.b is not None:
            v = entry.a.double() @ row
            v = v if entry.rank_scale is None else v * entry.rank_scale.double()
            delta = entry.b.double() @ v
            y = y + (delta if entry.delta_scale is None else delta * entry.delta_scale.double())
        y = y if entry.out_scale is None else y * entry.out_scale.double()
        result.append(y if entry.out_shift is None else y + entry.out_shift.double())
    return torch.stack(result) if result else torch.empty(0, NUM_OUT, dtype=torch.float64)


def run(kernel: Kernel, layer: torch.nn.Linear, x: torch.Tensor, segments: Segments, slots) -> torch.Tensor:
    y = layer(kernel.scale_inputs(x, segments=segments, slots=slots))
    kernel.apply_deltas_(y, x, segments=segments, members=[Member(0, y.shape[-1], slots)])
    return y


def check_kernels(kinds: Sequence[tuple[str, int]], segments: Sequence[tuple[int, int]], *, seed: int) -> None:
    torch.manual_seed(seed)
    shared = SlotWeights(a=torch.randn(5, NUM_IN), b=torch.randn(NUM_OUT, 5))
    slots = [build_slot(kind, rank, shared=shared) for kind, rank in kinds]
    cut = Segments(tuple(owner for owner, _ in segments), tuple(size for _, size in segments))
    owners = [owner for owner, size in segments for _ in range(size)]
    layer = torch.nn.Linear(NUM_IN, NUM_OUT)
    x = torch.randn(len(owners), NUM_IN)
    before = x.clone()
    with torch.inference_mode():
        exact = formula(x, layer, owners, slots)
        results = {name: run(kernel, layer, x, cut, slots) for name, kernel in KERNELS.items()}
    bound = 1e-5 * (1 + exact.abs().amax().item() if len(owners) else 1)
    for name, result in results.items():
        assert torch.equal(x, before), f"{name} changed its input"
        assert (result.double() - exact).abs().max().item() < bound if len(owners) else result.shape == exact.shape, (
            name
        )


slot_lists = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(1, 128)), min_size=1, max_size=6)


@settings(max_examples=80, deadline=None)
@given(data=st.data(), kinds=slot_lists, seed=st.integers(0, 2**16))
def test_every_kernel_computes_the_formula_for_any_segments(data: st.DataObject, kinds, seed) -> None:
    pairs = st.tuples(st.integers(-1, len(kinds) - 1), st.integers(0, 4))
    check_kernels(kinds, data.draw(st.lists(pairs, max_size=10)), seed=seed)


@pytest.mark.parametrize(
    ("kinds", "segments"),
    [
        ([("lora", 4)], []),
        ([("lora", 4)], [(0, 0)]),
        ([("lora", 4)], [(-1, 7)]),
        ([("lora", 4)], [(0, 1)]),
        ([("none", 1)], [(0, 3)]),
        ([("lora", rank) for rank in (1, 3, 8, 17, 64, 128)], [(slot, 1) for slot in range(6)]),
        ([("vera", 1), ("vera", 1), ("lora", 2), ("vera", 1)], [(0, 2), (1, 1), (-1, 1), (2, 3), (3, 1)]),
        ([(kind, 7) for kind in KINDS], [(-1, 2), *((slot, 2) for slot in range(len(KINDS)))]),
    ],
    ids=["no tokens", "an empty segment", "all base", "one row", "no module", "all distinct", "shared", "every kind"],
)
def test_every_kernel_handles(kinds, segments) -> None:
    check_kernels(kinds, segments, seed=1)


def test_auto_picks_the_cpu_kernel_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="server.kernels.dispatch"):
        assert pick_kernel("auto", device="cpu").name == "cpu"
    assert caplog.messages == ["kernel cpu: the fastest for device 'cpu'"]


def test_a_device_without_a_kernel_of_its_own_gets_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert pick_kernel("auto", device="cuda").name == "cpu"
    assert caplog.messages == [
        "kernel cpu: none is written for device 'cuda'; each segment costs two launches per linear"
    ]


def test_an_unknown_kernel_is_refused_with_the_list_of_names() -> None:
    with pytest.raises(SettingsError) as caught:
        pick_kernel("refernce", device="cpu")
    assert str(caught.value) == "Unknown kernel 'refernce'; allowed: auto, cpu, reference. Did you mean 'reference'?"


def test_a_step_without_adapters_is_exactly_the_base_layer() -> None:
    layer = torch.nn.Linear(NUM_IN, NUM_OUT)
    wrapped = AdapterLinear(layer, num_slots=2, kernel=KERNELS["cpu"])
    wrapped.write_slot(1, SlotWeights(out_scale=torch.zeros(NUM_OUT)))
    x = torch.randn(1, 3, NUM_IN)
    for step in (StepContext(None), StepContext(Segments((-1, 0), (2, 1)))):
        with step_context(step):
            assert torch.equal(wrapped(x), layer(x))
    assert torch.equal(wrapped(x), layer(x))


def test_steps_do_not_nest_and_end_with_their_block() -> None:
    with step_context(StepContext()):
        refused = pytest.raises(RuntimeError, match=r"^A step is already in progress .* Finish it first\.$")
        with refused, step_context(StepContext()):
            pass
        assert current_step() == StepContext()
    assert current_step() is None
