"""Steps for the kernels, and the formula they are measured by: float64, token by token, from its table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from server.kernels import KERNELS, Kernel, Member, Segments, SlotWeights

# The kernels that run without a GPU.
CPU_KERNELS = sorted(set(KERNELS) - {"triton"})
KINDS = ("none", "lora", "dora", "ia3-output", "ia3-input", "vera", "gated", "everything")
NUM_EXPERTS = 3


@dataclass(frozen=True)
class Case:
    """One step: x (T, H), y (T, sum of widths) = W u + bias, and per member its width and what each slot does."""

    x: Tensor
    y: Tensor
    segments: Segments
    widths: tuple[int, ...]
    slots: tuple[tuple[SlotWeights | None, ...], ...]
    gates: Tensor | None = None
    owners: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        pairs = zip(self.segments.owner, self.segments.sizes_tokens, strict=True)
        object.__setattr__(self, "owners", tuple(owner for owner, size in pairs for _ in range(size)))


def build_slot(kind: str, rank: int, *, num_in: int, num_out: int, shared: tuple[Tensor, Tensor]) -> SlotWeights | None:
    """Return random weights of one kind; shared: A (R, H) and B (O, R) of the VeRA slots."""
    lora = SlotWeights(a=torch.randn(rank, num_in), b=torch.randn(num_out, rank))
    experts = torch.randint(NUM_EXPERTS, (rank,))
    out_scale, out_shift, in_scale = torch.randn(num_out), torch.randn(num_out), torch.randn(num_in)
    scales = {"rank_scale": torch.randn(rank), "delta_scale": torch.randn(num_out)}
    match kind:
        case "lora":
            return lora
        case "dora":
            return replace(lora, out_scale=out_scale, out_shift=out_shift)
        case "ia3-output":
            return SlotWeights(out_scale=out_scale)
        case "ia3-input":
            return SlotWeights(in_scale=in_scale)
        case "vera":
            a, b = shared
            return SlotWeights(a=a, b=b, rank_scale=torch.randn(a.shape[0]), delta_scale=torch.randn(num_out))
        case "gated":
            return replace(lora, expert_of_rank=experts)
        case "everything":
            last = {"out_scale": out_scale, "out_shift": out_shift, "in_scale": in_scale, "expert_of_rank": experts}
            return replace(lora, **scales, **last)
    return None


def build_case(
    kinds: Sequence[Sequence[tuple[str, int]]],
    segments: Sequence[tuple[int, int]],
    *,
    num_in: int = 12,
    widths: Sequence[int] = (20, 8, 5),
    has_gates: bool = True,
    seed: int = 0,
) -> Case:
    """Return a random step; kinds: per slot, for each member, kind and rank; segments: pairs of slot and tokens."""
    torch.manual_seed(seed)
    widths = widths[: len(kinds[0])] if kinds else widths[:1]
    columns: list[tuple[SlotWeights | None, ...]] = []
    for idx, width in enumerate(widths):
        # Views of wider projections, as modules of several sizes share them.
        shared = (torch.randn(5, num_in + 3)[:, :num_in], torch.randn(width + 4, 5)[:width])
        slots = (build_slot(*row[idx], num_in=num_in, num_out=width, shared=shared) for row in kinds)
        columns.append(tuple(slots))
    num_tokens = sum(size for _, size in segments)
    cut = Segments(tuple(owner for owner, _ in segments), tuple(size for _, size in segments))
    x, y = torch.randn(num_tokens, num_in), torch.randn(num_tokens, sum(widths))
    gates = torch.rand(num_tokens, NUM_EXPERTS) if has_gates else None
    return Case(x, y, cut, tuple(widths), tuple(columns), gates)


def run_cases(kernel: Kernel, cases: Sequence[Case]) -> list[tuple[Tensor, list[Tensor]]]:
    """Run steps one after another on the same members, writing their slots in between, as a server does.

    Returns y and, per member, the scaled inputs u of each step.
    """
    lives: list[list[SlotWeights | None]] = [list(column) for column in cases[0].slots]
    starts = [sum(cases[0].widths[:idx]) for idx in range(len(lives))]
    placed = zip(starts, cases[0].widths, lives, strict=True)
    members = [Member(start, width, live) for start, width, live in placed]
    results: list[tuple[Tensor, list[Tensor]]] = []
    with torch.inference_mode():
        for case in cases:
            for live, column in zip(lives, case.slots, strict=True):
                live[:] = column
            inputs = [kernel.scale_inputs(case.x, segments=case.segments, slots=live) for live in lives]
            y = case.y.clone()
            kernel.apply_deltas_(y, case.x, segments=case.segments, members=members, gates=case.gates)
            results.append((y, inputs))
    return results


def exact(case: Case) -> tuple[Tensor, list[Tensor]]:
    """Return what `run_cases` should return for one step, in float64."""
    columns = [_exact_member(case, idx) for idx in range(len(case.widths))]
    return torch.cat([y for y, _ in columns], dim=1), [u for _, u in columns]


def _exact_member(case: Case, idx: int) -> tuple[Tensor, Tensor]:
    start = sum(case.widths[:idx])
    y = case.y[:, start : start + case.widths[idx]].double()
    u = case.x.double()
    for token, owner in enumerate(case.owners):
        entry = (case.slots[idx][owner] if owner >= 0 else None) or SlotWeights()
        x = case.x[token].double()
        if entry.a is not None and entry.b is not None:
            v = entry.a.double() @ x
            if entry.rank_scale is not None:
                v = v * entry.rank_scale.double()
            if entry.expert_of_rank is not None and case.gates is not None:
                v = v * case.gates[token].double()[entry.expert_of_rank]
            delta = entry.b.double() @ v
            y[token] += delta if entry.delta_scale is None else delta * entry.delta_scale.double()
        if entry.out_scale is not None:
            y[token] *= entry.out_scale.double()
        if entry.out_shift is not None:
            y[token] += entry.out_shift.double()
        if entry.in_scale is not None:
            u[token] *= entry.in_scale.double()
    return y, u


def largest_error(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to 1 + the largest expected value; 0 for nothing."""
    assert found.shape == expected.shape
    if not expected.numel():
        return 0.0
    return ((found.double() - expected).abs().max() / (1 + expected.abs().max())).item()
