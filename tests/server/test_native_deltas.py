"""The compiled kernel of adapters: chunks, strides and slots that change between calls, against float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from server.kernels import Kernel, Member, Segments, SlotWeights, by_columns, load_kernel
from tests.support.kernel_cases import Case, build_case, exact, largest_error, run_cases
from tests.support.native import require_library

BOUND = 1e-5  # Relative to 1 + the largest value: sums of up to 64 ranks in float32.


@pytest.fixture(autouse=True)
def _compiled() -> None:
    require_library()


@pytest.fixture
def kernel() -> Kernel:
    return load_kernel("native")


def lora(num_in: int, num_out: int, rank: int) -> SlotWeights:
    return SlotWeights(a=torch.randn(rank, num_in), b=torch.randn(num_out, rank))


def check(kernel: Kernel, case: Case) -> Tensor:
    """Compare one step with float64 and return what the kernel made of y."""
    [(found, _)] = run_cases(kernel, [case])
    assert largest_error(found, exact(case)[0]) < BOUND
    return found


class Group:
    """Members as a layer keeps them: live lists of slots that are written between calls."""

    def __init__(self, kernel: Kernel, *, num_in: int, widths: Sequence[int], num_slots: int) -> None:
        self.kernel, self.num_in, self.widths = kernel, num_in, tuple(widths)
        self.slots: list[list[SlotWeights | None]] = [[None] * num_slots for _ in widths]
        starts = [sum(widths[:idx]) for idx in range(len(widths))]
        self.members = [Member(*place) for place in zip(starts, widths, self.slots, strict=True)]

    def check(self, segments: Segments, *, gates: Tensor | None = None) -> None:
        num_tokens = sum(segments.sizes_tokens)
        x, y = torch.randn(num_tokens, self.num_in), torch.randn(num_tokens, sum(self.widths))
        case = Case(x, y, segments, self.widths, tuple(tuple(column) for column in self.slots), gates)
        found = y.clone()
        self.kernel.apply_deltas_(found, x, segments=segments, members=self.members, gates=gates)
        assert largest_error(found, exact(case)[0]) < BOUND


@pytest.mark.parametrize("num_in", [1, 7, 16, 33])
@pytest.mark.parametrize("width", [1, 15, 63, 64, 65, 200])
def test_segments_of_any_length_over_widths_that_fill_no_vector(kernel: Kernel, num_in: int, width: int) -> None:
    chunk = require_library().chunk_tokens
    segments = [(0, chunk - 1), (1, chunk), (-1, 3), (2, chunk + 1), (0, 3 * chunk + 1), (1, 0), (2, 1)]
    kinds = [[("lora", 5)], [("everything", 9)], [("dora", 1)]]
    check(kernel, build_case(kinds, segments, num_in=num_in, widths=(width,), seed=width))


def test_many_slots_with_segments_of_one_token(kernel: Kernel) -> None:
    kinds = [[("lora", 1 + slot % 9), ("none", 0) if slot % 3 else ("dora", 4)] for slot in range(100)]
    check(kernel, build_case(kinds, [(slot, 1) for slot in reversed(range(100))], widths=(70, 9)))


def test_a_slot_is_read_anew_after_every_write(kernel: Kernel) -> None:
    torch.manual_seed(0)
    group = Group(kernel, num_in=24, widths=(40, 8), num_slots=3)
    segments = Segments((0, 1, -1, 2), (2, 1, 1, 9))
    for round_idx in range(30):  # Enough for an address, or the identity of an object, to come back.
        group.slots[round_idx % 2][round_idx % 3] = lora(24, group.widths[round_idx % 2], 1 + round_idx % 7)
        group.check(segments)
    group.slots[0][1] = None
    group.check(segments)
    for column in group.slots:
        column[:] = [None] * 3
    group.check(segments)


def test_a_cleared_slot_leaves_y_untouched(kernel: Kernel) -> None:
    group = Group(kernel, num_in=24, widths=(40,), num_slots=1)
    group.slots[0][0] = lora(24, 40, 8)
    group.check(Segments((0,), (3,)))
    group.slots[0][0] = None
    x, y = torch.randn(3, 24), torch.randn(3, 40)
    found = y.clone()
    kernel.apply_deltas_(found, x, segments=Segments((0,), (3,)), members=group.members)
    assert torch.equal(found, y)


def test_ranks_may_grow_and_shrink_between_calls(kernel: Kernel) -> None:
    torch.manual_seed(0)
    group = Group(kernel, num_in=24, widths=(40,), num_slots=2)
    for first, second in ((1, 0), (64, 2), (3, 300), (0, 0), (2, 1)):
        group.slots[0][:] = [lora(24, 40, first), lora(24, 40, second)]
        group.check(Segments((0, 1), (5, 9)))


def test_groups_take_turns_within_steps_of_different_cuts(kernel: Kernel) -> None:
    """One kernel serves every group of a model; what it remembers of one must not reach the next."""
    torch.manual_seed(0)
    groups = [Group(kernel, num_in=num_in, widths=(width,), num_slots=2) for num_in, width in ((24, 40), (9, 70))]
    for group in groups:
        group.slots[0][:] = [lora(group.num_in, group.widths[0], 3), None]
    for segments in (Segments((0,), (4,)), Segments((1, 0), (1, 17)), Segments((0,), (4,)), Segments((-1,), (2,))):
        for group in groups:
            group.check(segments)


def test_members_may_be_left_alone_by_a_slot_or_have_no_ranks(kernel: Kernel) -> None:
    kinds = [
        [("none", 0), ("lora", 8), ("none", 0)],
        [("lora", 0), ("none", 0), ("everything", 3)],
        [("everything", 0), ("dora", 0), ("gated", 0)],
        [("none", 0)] * 3,
    ]
    case = build_case(kinds, [(0, 3), (1, 2), (2, 9), (3, 1), (-1, 2)], widths=(70, 64, 3))
    found = check(kernel, case)
    assert torch.equal(found[:3, :70], case.y[:3, :70])
    assert torch.equal(found[14:], case.y[14:])


def test_shared_projections_may_be_views_on_larger_ones(kernel: Kernel) -> None:
    """VeRA cuts A (R, widest H) and B (widest O, R) to each linear: rows lie further apart than they are long."""
    torch.manual_seed(0)
    a, b = torch.randn(9, 100), torch.randn(300, 9)
    views = a[:, :33], b[:130]
    slots = [
        SlotWeights(a=views[0], b=views[1], rank_scale=torch.randn(9), delta_scale=torch.randn(130)) for _ in range(2)
    ]
    transposed = SlotWeights(a=torch.randn(33, 9).t(), b=torch.randn(9, 130).t())
    column = (*slots, transposed)
    x, y = torch.randn(14, 33), torch.randn(14, 130)
    check(kernel, Case(x, y, Segments((0, 1, 2), (3, 2, 9)), (130,), (column,)))


def test_scales_may_be_views_with_gaps(kernel: Kernel) -> None:
    torch.manual_seed(0)
    gaps = [torch.randn(2 * size)[::2] for size in (5, 40, 40, 40)]
    experts = torch.tensor([0, 9, 1, 9, 2, 9, 1, 9, 0, 9])[::2]
    named = dict(zip(("rank_scale", "delta_scale", "out_scale", "out_shift"), gaps, strict=True))
    slot = replace(lora(24, 40, 5), **named, expert_of_rank=experts)
    x, y = torch.randn(4, 24), torch.randn(4, 40)
    check(kernel, Case(x, y, Segments((0,), (4,)), (40,), ((slot,),), torch.rand(4, 3)))


def test_inputs_outputs_and_gates_may_be_parts_of_larger_tensors(kernel: Kernel) -> None:
    torch.manual_seed(0)
    slot = replace(lora(24, 40, 6), expert_of_rank=torch.tensor([0, 1, 2, 2, 1, 0]))
    segments, gates = Segments((0,), (11,)), torch.rand(11, 5, 3)  # One matrix of gates per decoder layer.
    wide_y = torch.randn(11, 90)
    for x in (torch.randn(11, 60)[:, 7:31], torch.randn(24, 11).t(), torch.randn(22, 24)[::2]):
        y = wide_y.clone()
        case = Case(x, y[:, 20:60], segments, (40,), ((slot,),), gates[:, 3])
        wanted = exact(case)[0]
        kernel.apply_deltas_(y[:, 20:60], x, segments=segments, members=[Member(0, 40, [slot])], gates=gates[:, 3])
        assert largest_error(y[:, 20:60], wanted) < BOUND
        assert torch.equal(y[:, :20], wide_y[:, :20])
        assert torch.equal(y[:, 60:], wide_y[:, 60:])


def test_gates_reach_only_slots_with_experts(kernel: Kernel) -> None:
    case = build_case([[("gated", 7)], [("lora", 7)], [("everything", 12)]], [(0, 9), (1, 2), (2, 3)], widths=(70,))
    found = check(kernel, case)
    without = check(kernel, replace(case, gates=None))
    assert torch.equal(found[9:11], without[9:11])
    assert not torch.equal(found[:9], without[:9])


def test_experts_that_the_gates_do_not_name_get_ones(kernel: Kernel) -> None:
    case = build_case([[("gated", 30)]], [(0, 9)])
    assert case.gates is not None
    ones = torch.cat([case.gates[:, :1], torch.ones(9, 2)], dim=1)
    [(narrow, _)] = run_cases(kernel, [replace(case, gates=case.gates[:, :1])])
    [(wide, _)] = run_cases(kernel, [replace(case, gates=ones)])
    assert torch.equal(narrow, wide)


def test_a_row_keeps_its_bits_when_others_move_or_leave(kernel: Kernel) -> None:
    """Sizes that fill neither a vector nor a chunk, and every parity of the number of tokens."""
    kinds = [[("lora", 13), ("everything", 7)], [("gated", 33), ("dora", 9)], [("vera", 0), ("lora", 1)]]
    pairs = [(0, 3), (1, 11), (-1, 2), (2, 8), (0, 1), (1, 2)]
    case = build_case(kinds, pairs, num_in=45, widths=(101, 7))
    assert case.gates is not None
    whole = check(kernel, case)
    torch.manual_seed(0)
    for num_kept in (27, 27, 20, 14, 7, 3, 1):
        kept = torch.randperm(27)[:num_kept].tolist()
        owners = [case.owners[token] for token in kept]
        segments = Segments(tuple(owners), (1,) * num_kept)  # Neighbours of one slot stay apart.
        part = replace(case, x=case.x[kept], y=case.y[kept], gates=case.gates[kept], segments=segments)
        assert torch.equal(check(kernel, part), whole[kept])
        order = sorted(range(num_kept), key=owners.__getitem__)  # And together.
        sizes = [(owner, owners.count(owner)) for owner in sorted(set(owners))]
        tokens = [kept[idx] for idx in order]
        segments = Segments(*(tuple(column) for column in zip(*sizes, strict=True)))
        part = replace(case, x=case.x[tokens], y=case.y[tokens], gates=case.gates[tokens], segments=segments)
        assert torch.equal(check(kernel, part), whole[tokens])


def test_what_one_kernel_remembers_is_not_what_another_does() -> None:
    first, second = load_kernel("native"), load_kernel("native")
    torch.manual_seed(0)
    group = Group(first, num_in=24, widths=(40,), num_slots=1)
    segments = Segments((0,), (3,))
    for kernel in (first, second, first):
        group.kernel = kernel
        group.slots[0][0] = lora(24, 40, 5)
        group.check(segments)


def test_a_kernel_tells_what_it_will_read_each_tensor_once() -> None:
    kernel = load_kernel("native")
    shared = torch.randn(6, 20), torch.randn(9, 6)
    slots = [
        SlotWeights(a=torch.randn(3, 20), b=by_columns(torch.randn(9, 3))),
        None,
        SlotWeights(a=shared[0], b=by_columns(shared[1]), rank_scale=torch.ones(6)),
        SlotWeights(out_scale=torch.ones(9)),
        SlotWeights(a=torch.randn(5, 20), b=by_columns(torch.randn(9, 5))),
    ]
    slots.append(replace(slots[2], rank_scale=torch.zeros(6)))
    member = Member(0, 9, slots)

    def read(*owners: int) -> dict[int, int]:
        found = kernel.reads(segments=Segments(owners, (1,) * len(owners)), members=[member])
        assert len(dict(found.tolist())) == len(found)
        return dict(found.tolist())

    def lines(*owners: int) -> dict[int, int]:
        tensors = [tensor for owner in owners for tensor in (slots[owner].a, slots[owner].b)]
        return {tensor.data_ptr(): -(-tensor.nbytes // 64) for tensor in tensors}

    assert read(0, -1, 1, 2, 5, 3) == lines(0, 2)
    assert read(-1, 1) == {}
    wide = torch.randn(6, 32)
    slots[1] = SlotWeights(a=wide[:, :20], b=shared[1])
    assert wide.data_ptr() not in read(1)
    assert read(0) == lines(0)
    slots[0] = slots[4]
    assert read(0) == lines(4)  # The same owners, another adapter.
