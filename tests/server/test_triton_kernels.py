"""The Triton kernel in its interpreter, which knows no bfloat16 products, and its programs through the compiler."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from server.kernels import Member, Segments, SlotWeights, load_kernel
from tests.support.kernel_cases import KINDS, Case, build_case, exact, largest_error
from tests.support.triton_interpreter import Interpreter, interpreter

pytest.importorskip("triton")

NUM_IN = 12
TOLERANCES = {torch.float32: 1e-5, torch.float16: 5e-3}


@pytest.fixture(scope="module")
def triton() -> Iterator[Interpreter]:
    with interpreter() as started:
        yield started


def to_dtype(case: Case, dtype: torch.dtype) -> Case:
    def convert(value: Tensor | None) -> Tensor | None:
        return value.to(dtype) if value is not None and value.is_floating_point() else value

    def convert_slot(weights: SlotWeights | None) -> SlotWeights | None:
        names = [one.name for one in fields(SlotWeights)]
        return None if weights is None else SlotWeights(**{name: convert(getattr(weights, name)) for name in names})

    slots = tuple(tuple(convert_slot(weights) for weights in column) for column in case.slots)
    return replace(case, x=case.x.to(dtype), y=case.y.to(dtype), slots=slots)


def check(triton: Interpreter, *cases: Case) -> None:
    for case, (y, inputs) in zip(cases, triton.run(cases), strict=True):
        exact_y, exact_inputs = exact(case)
        assert y.dtype is case.y.dtype
        assert largest_error(y, exact_y) < TOLERANCES[y.dtype]
        for found, wanted in zip(inputs, exact_inputs, strict=True):
            assert largest_error(found, wanted) < TOLERANCES[y.dtype]


modules = st.tuples(st.sampled_from(KINDS), st.sampled_from([0, 1, 3, 16, 17]))


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_it_computes_the_formula_for_any_step(triton: Interpreter, data: st.DataObject) -> None:
    num_members = data.draw(st.integers(1, 2))
    kinds = data.draw(st.lists(st.lists(modules, min_size=num_members, max_size=num_members), min_size=1, max_size=4))
    pairs = st.tuples(st.integers(-1, len(kinds) - 1), st.integers(0, 18))
    segments = data.draw(st.lists(pairs, max_size=5))
    case = build_case(kinds, segments, has_gates=data.draw(st.booleans()), seed=data.draw(st.integers(0, 99)))
    check(triton, case)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=["float32", "float16"])
def test_it_serves_every_kind_in_one_step(triton: Interpreter, dtype: torch.dtype) -> None:
    kinds = [[(kind, 17), (kind, 1)] for kind in KINDS]
    case = build_case(kinds, [(-1, 2), *((slot, 2) for slot in range(len(KINDS)))])
    check(triton, to_dtype(case, dtype))


def test_it_adds_the_pieces_of_wide_inputs_and_the_tiles_of_wide_outputs(triton: Interpreter) -> None:
    kinds = [[("lora", 16), ("dora", 40)], [("everything", 8), ("none", 0)]]
    aligned = build_case(kinds, [(0, 17), (-1, 1), (1, 2)], num_in=2176, widths=(272, 16))
    odd = build_case(kinds, [(0, 17), (-1, 1), (1, 2)], num_in=1031, widths=(133, 9))
    check(triton, aligned)
    check(triton, odd)


def test_a_slot_that_is_written_again_keeps_nothing_of_what_was_there(triton: Interpreter) -> None:
    steps = [[("everything", 40), ("lora", 3)], [("lora", 1), ("none", 0)], [("ia3-output", 0), ("vera", 0)]]
    check(triton, *(build_case([kinds], [(0, 2), (-1, 1)], seed=seed) for seed, kinds in enumerate(steps)))


def test_steps_of_different_sizes_follow_each_other(triton: Interpreter) -> None:
    cuts = ([(0, 1)], [(1, 40), (0, 3)], [(-1, 4)], [(0, 1)], [(-1, 1), (0, 2), (1, 1), (0, 1)])
    check(triton, *(build_case([[("lora", 4)], [("dora", 2)]], cut) for cut in cuts))


def test_what_a_row_gets_does_not_depend_on_the_other_rows(triton: Interpreter) -> None:
    segments = [(0, 3), (-1, 2), (1, 1), (2, 20), (0, 1), (3, 5)]
    kinds = [[("lora", 17)], [("vera", 0)], [("gated", 5)], [("vera", 0)]]
    case = build_case(kinds, segments, num_in=1100, widths=(130,))
    order = list(range(len(case.owners)))
    random.Random(0).shuffle(order)
    gates = case.gates
    assert gates is not None
    cut = Segments(tuple(case.owners[token] for token in order), (1,) * len(order))
    permuted = replace(case, x=case.x[order], y=case.y[order], gates=gates[order], segments=cut)
    (before, _), (after, _) = triton.run([case, permuted])
    assert torch.equal(after, before[order])
    base = [token for token, owner in enumerate(case.owners) if owner < 0]
    assert torch.equal(before[base], case.y[base])


def test_columns_that_do_not_lie_side_by_side_are_refused() -> None:
    y = torch.zeros(3, 2).t()
    with pytest.raises(ValueError, match=r"^y has strides \(1, 2\); its columns .* Pass y\.contiguous\(\)\.$"):
        load_kernel("triton").apply_deltas_(y, torch.zeros(2, 4), segments=Segments((0,), (2,)), members=[])


def test_a_graph_may_replay_steps_that_differ_in_rows_and_weights_but_not_in_grid_or_capacity() -> None:
    from server.kernels.triton import TritonKernel

    kernel = TritonKernel()
    live = [SlotWeights(a=torch.zeros(4, NUM_IN), b=torch.zeros(8, 4)), None]
    groups = [[Member(0, 8, live)]]

    def key(*segments: tuple[int, int]) -> tuple[int, ...]:
        cut = Segments(tuple(owner for owner, _ in segments), tuple(size for _, size in segments))
        return kernel.graph_key(cut, groups, dtype=torch.float32, device=torch.device("cpu"))

    first = key((0, 1), (-1, 2))
    assert key((0, 16), (-1, 2)) == first
    live[1] = SlotWeights(a=torch.zeros(16, NUM_IN), b=torch.zeros(8, 16))
    assert key((1, 2), (-1, 5)) == first
    assert key((0, 1), (1, 1)) != first
    live[1] = SlotWeights(a=torch.zeros(17, NUM_IN), b=torch.zeros(8, 17))
    assert key((1, 1)) != first
    live[1] = None
    assert key((0, 1)) != first  # Captured memory for the larger rank stays.


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_its_programs_compile_to_wide_loads_without_atomics_or_rounded_inputs(
    dtype: str, capability: int, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton import compile as compile_program
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from server.kernels import triton_programs

    types = dict.fromkeys(("x_ptr", "y_ptr", "u_ptr"), f"*{dtype}") | {"chunks_ptr": "*i32"}
    types |= {"scratch_ptr": "*fp32", "gates_ptr": "*fp32", "places_ptr": "*i64", "fields_ptr": "*i64"}
    known = {"BLOCK_IN": 128, "ALIGNED": True}
    for name in ("shrink", "expand", "scale_inputs"):
        program = getattr(triton_programs, name)
        constants = {arg: known[arg] for arg in program.arg_names if arg in known}
        signature = {arg: "constexpr" if arg in known else types.get(arg, "i32") for arg in program.arg_names}
        unaligned = {"num_tokens", "num_pieces", "num_experts", *known}
        aligned = [(idx,) for idx, arg in enumerate(program.arg_names) if arg not in unaligned]
        attributes = {place: [["tt.divisibility", 16]] for place in aligned}
        source = ASTSource(program, signature, constexprs=constants, attrs=attributes)
        code = compile_program(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
        assert "ld.global.v4" in code or "cp.async.cg.shared.global" in code, name
        assert not {"atom.global", "red.global"} & set(re.findall(r"\w+\.global", code)), name
        rounds_inputs = re.search(r"mma\.\S*tf32", code) is not None
        assert not rounds_inputs, name
