"""The oracle: the formula of `server.kernels.base`, one token at a time, as plain as it can be written.

Knows tensors and segments. Slow and exact; tests compare every other kernel with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from server.kernels.base import Kernel, Member, Segments, SlotWeights

__all__ = ["apply_deltas_", "build_kernel", "scale_inputs"]


def _weights_per_token(segments: Segments, slots: Sequence[SlotWeights | None]) -> Iterator[tuple[int, SlotWeights]]:
    token = 0
    for owner, size in zip(segments.owner, segments.sizes_tokens, strict=True):
        weights = slots[owner] if owner >= 0 else None
        for _ in range(size):
            if weights is not None:
                yield token, weights
            token += 1


def build_kernel() -> Kernel:
    """Return the kernel; it remembers nothing."""
    return Kernel("reference", scale_inputs, apply_deltas_)


def scale_inputs(x: Tensor, *, segments: Segments, slots: Sequence[SlotWeights | None]) -> Tensor:
    """Return u[t] = x[t] * in_scale; x: (T, H). x is not changed."""
    u = x.clone()
    for token, weights in _weights_per_token(segments, slots):
        if weights.in_scale is not None:
            u[token] = x[token] * weights.in_scale
    return u


def apply_deltas_(
    y: Tensor, x: Tensor, *, segments: Segments, members: Sequence[Member], gates: Tensor | None = None
) -> None:
    """Apply every member to its columns of y (T, O_total), in place; x: (T, H), gates: (T, K) float32."""
    for member in members:
        columns = slice(member.start, member.start + member.width)
        for token, weights in _weights_per_token(segments, member.slots):
            gate = None
            if gates is not None and weights.expert_of_rank is not None:
                gate = gates[token, weights.expert_of_rank]
            y[token, columns] = _adapted(y[token, columns], x[token], weights, gate=gate)


def _adapted(y: Tensor, x: Tensor, weights: SlotWeights, *, gate: Tensor | None) -> Tensor:
    """Return out_scale * (y + delta_scale * (B ((A x) * rank_scale * gate))) + out_shift; y: (O,), x: (H,)."""
    if weights.a is not None and weights.b is not None:
        v = weights.a @ x
        if weights.rank_scale is not None:
            v = v * weights.rank_scale
        if gate is not None:
            v = v * gate.to(v.dtype)
        delta = weights.b @ v
        if weights.delta_scale is not None:
            delta = delta * weights.delta_scale
        y = y + delta
    if weights.out_scale is not None:
        y = y * weights.out_scale
    if weights.out_shift is not None:
        y = y + weights.out_shift
    return y
