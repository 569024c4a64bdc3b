from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterhub.errors import SettingsError
from server.kernels import Segments, SlotWeights, load_kernel, pick_kernel
from server.step_context import StepContext, current_step, step_context
from tests.support.kernel_cases import CPU_KERNELS, KINDS, Case, build_case, exact, largest_error, run_cases

NUM_IN, NUM_OUT = 12, 20
ODD_RANKS = (0, 1, 3, 8, 17, 64)


def check_kernels(cases: Sequence[Case]) -> None:
    expected = [exact(case) for case in cases]
    before = [(case.x.clone(), case.y.clone()) for case in cases]
    for name in CPU_KERNELS:
        for case, (x, _), (y, inputs), (exact_y, exact_inputs) in zip(
            cases, before, run_cases(load_kernel(name), cases), expected, strict=True
        ):
            assert torch.equal(case.x, x), f"{name} changed its input"
            assert largest_error(y, exact_y) < 1e-5, name
            for found, wanted in zip(inputs, exact_inputs, strict=True):
                assert largest_error(found, wanted) < 1e-6, name


ranks = st.one_of(st.sampled_from(ODD_RANKS), st.integers(1, 128))
modules = st.tuples(st.sampled_from(KINDS), ranks)


@st.composite
def steps(draw: st.DrawFn) -> Case:
    num_members = draw(st.integers(1, 3))
    kinds = draw(st.lists(st.lists(modules, min_size=num_members, max_size=num_members), min_size=1, max_size=6))
    pairs = st.tuples(st.integers(-1, len(kinds) - 1), st.integers(0, 6))
    segments = draw(st.lists(pairs, max_size=len(kinds) + 4))
    return build_case(kinds, segments, has_gates=draw(st.booleans()), seed=draw(st.integers(0, 2**16)))


@settings(max_examples=60, deadline=None)
@given(steps())
def test_every_kernel_computes_the_formula_for_any_step(case: Case) -> None:
    check_kernels([case])


@pytest.mark.parametrize(
    ("kinds", "segments"),
    [
        ([[("lora", 4)]], []),
        ([[("lora", 4)]], [(0, 0)]),
        ([[("lora", 4)] * 3], [(-1, 7)]),
        ([[("lora", 4)] * 3], [(0, 1)]),
        ([[("none", 1)] * 2], [(0, 3)]),
        ([[("lora", rank)] for rank in ODD_RANKS], [(slot, 1) for slot in range(6)]),
        ([[("lora", 4)]] * 2, [(0, 2), (1, 3), (0, 1), (-1, 1), (1, 17)]),
        ([[("vera", 1)]] * 2 + [[("lora", 2)], [("vera", 1)]], [(0, 2), (1, 1), (-1, 1), (2, 3), (3, 1)]),
        ([[("lora", 1), ("none", 0), ("lora", 64)], [("none", 0), ("dora", 3), ("vera", 0)]], [(0, 2), (1, 5)]),
        ([[(kind, 7), (kind, 2), (kind, 0)] for kind in KINDS], [(-1, 2), *((slot, 2) for slot in range(len(KINDS)))]),
    ],
    ids=[
        "no tokens",
        "an empty segment",
        "all base",
        "one row",
        "no module",
        "all distinct",
        "a slot twice",
        "shared",
        "unequal members",
        "every kind",
    ],
)
def test_every_kernel_handles(kinds, segments) -> None:
    check_kernels([build_case(kinds, segments, seed=1)])


def test_a_slot_that_is_written_again_keeps_nothing_of_what_was_there() -> None:
    first = [[("everything", 64), ("everything", 17)], [("dora", 8), ("lora", 3)]]
    later = [[("lora", 1), ("none", 0)], [("ia3-output", 0), ("vera", 0)]]
    segments = [(0, 3), (-1, 1), (1, 2)]
    check_kernels([build_case(kinds, segments, seed=seed) for seed, kinds in enumerate((first, later, first))])


@pytest.mark.parametrize("name", CPU_KERNELS)
def test_a_slot_with_stacked_ranks_is_the_weighted_sum_of_its_parts(name: str) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(4, NUM_IN), torch.randn(4, NUM_OUT)
    ranks, weights = (1, 8, 3), (0.5, -1.25, 2.0)
    parts = [(torch.randn(rank, NUM_IN), torch.randn(NUM_OUT, rank)) for rank in ranks]
    scaled = [b * weight for (_, b), weight in zip(parts, weights, strict=True)]
    mixed = SlotWeights(a=torch.cat([a for a, _ in parts]), b=torch.cat(scaled, dim=1))
    [(found, _)] = run_cases(load_kernel(name), [Case(x, y, Segments((0,), (4,)), (NUM_OUT,), ((mixed,),))])
    deltas = [
        weight * (x.double() @ a.double().t()) @ b.double().t() for (a, b), weight in zip(parts, weights, strict=True)
    ]
    assert largest_error(found, y.double() + sum(deltas)) < 1e-6


@pytest.mark.parametrize("name", CPU_KERNELS)
def test_gates_of_a_token_choose_among_the_experts_of_its_slot(name: str) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(3, NUM_IN), torch.randn(3, NUM_OUT)
    a, b = torch.randn(5, NUM_IN), torch.randn(NUM_OUT, 5)
    experts = SlotWeights(a=a, b=b, expert_of_rank=torch.tensor([0, 0, 1, 1, 1]))
    gates = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.25, 0.75]])
    case = Case(x, y, Segments((0,), (3,)), (NUM_OUT,), ((experts,),), gates)
    [(found, _)] = run_cases(load_kernel(name), [case])
    first, second = (
        x.double() @ a[:2].double().t() @ b[:, :2].double().t(),
        x.double() @ a[2:].double().t() @ b[:, 2:].double().t(),
    )
    expected = y.double() + torch.stack([first[0], second[1], 0.25 * first[2] + 0.75 * second[2]])
    assert largest_error(found, expected) < 1e-6


def test_auto_picks_the_cpu_kernel_where_none_is_compiled_and_says_why(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.kernels.dispatch.find_library", lambda: None)
    with caplog.at_level(logging.INFO, logger="server.kernels.dispatch"):
        assert pick_kernel("auto", device="cpu").name == "cpu"
    assert caplog.messages == ["kernel cpu: the fastest for device 'cpu'"]


def test_auto_picks_triton_on_a_gpu_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("triton")
    with caplog.at_level(logging.INFO, logger="server.kernels.dispatch"):
        assert pick_kernel("auto", device="cuda").name == "triton"
    assert caplog.messages == ["kernel triton: the fastest for device 'cuda'"]


def test_a_gpu_without_triton_gets_the_cpu_kernel_and_a_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.kernels.dispatch.find_spec", lambda _: None)
    assert pick_kernel("auto", device="cuda").name == "cpu"
    assert caplog.messages == [
        "kernel cpu: 'triton' is not installed; on 'cuda' each segment costs two launches per linear"
    ]


def test_an_unknown_kernel_is_refused_with_the_list_of_names() -> None:
    with pytest.raises(SettingsError) as caught:
        pick_kernel("refernce", device="cpu")
    assert str(caught.value) == (
        "Unknown kernel 'refernce'; allowed: auto, cpu, native, reference, triton. Did you mean 'reference'?"
    )


@pytest.mark.parametrize(
    ("device", "has_package", "where"), [("cpu", True, "'cpu'"), ("cuda", False, "'cuda' without the package")]
)
def test_triton_is_refused_where_it_cannot_run(
    device: str, has_package: bool, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.kernels.dispatch.find_spec", lambda name: name if has_package else None)
    with pytest.raises(SettingsError) as caught:
        pick_kernel("triton", device=device)
    assert str(caught.value) == (
        f"The kernel 'triton' needs a GPU and the package 'triton'; this server runs on {where}. "
        "Use 'auto' to let the server choose."
    )


def test_picking_the_cpu_kernel_imports_no_other() -> None:
    code = (
        "import sys; from server.kernels import pick_kernel; pick_kernel('cpu', device='cpu'); "
        "print([name for name in ('triton', 'server.kernels.reference') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_steps_do_not_nest_and_end_with_their_block() -> None:
    with step_context(StepContext()):
        refused = pytest.raises(RuntimeError, match=r"^A step is already in progress .* Finish it first\.$")
        with refused, step_context(StepContext()):
            pass
        assert current_step() == StepContext()
    assert current_step() is None
