"""The one formula that serves every adapter method, and the signature of the kernels that compute it.

For token t that uses slot z, at one linear with base weight W and bias:

    u = x * in_scale
    y = out_scale * (W u + bias + delta_scale * (B ((A x) * rank_scale * gate))) + out_shift

| method       | A, B   | rank_scale | delta_scale | out_scale               | in_scale |
|--------------|--------|------------|-------------|-------------------------|----------|
| LoRA, rsLoRA | own    | scale      | .           | .                       | .        |
| AdaLoRA      | own    | E * scale  | .           | .                       | .        |
| VeRA         | shared | d          | b           | .                       | .        |
| DoRA         | own    | scale      | .           | m / ||W + scale B A||   | .        |
| IA3          | none   | .          | .           | l, on the bias as well  | or l     |

A dot stands for ones; out_shift is zero unless a method leaves the bias alone. gate is one number per token and rank
component: the weight the token gives to the expert the component belongs to, ones for slots without experts. A mix of
adapters is one slot whose rank is the sum of the ranks.

Sources: LoRA https://arxiv.org/abs/2106.09685, rsLoRA https://arxiv.org/abs/2312.03732, AdaLoRA
https://arxiv.org/abs/2303.10512, VeRA https://arxiv.org/abs/2310.11454, DoRA https://arxiv.org/abs/2402.09353, IA3
https://arxiv.org/abs/2205.05638. Batching by segments: Punica, https://arxiv.org/abs/2310.18547.

Knows tensors and segments. Does not know requests, adapter names, models or HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Kernel", "Member", "Segments", "SlotWeights", "by_columns"]


@dataclass(frozen=True, slots=True, eq=False)
class SlotWeights:
    """What one slot does at one linear; None stands for ones, and for no low-rank part when `a` is None.

    a: (R, H); b: (O, R); rank_scale: (R,); delta_scale, out_scale, out_shift: (O,); in_scale: (H,); all in the dtype
    of the activations. out_shift is added at the end: it takes back what out_scale did to the bias of the base layer
    for methods that leave the bias alone. b is read fastest as `by_columns` gives it. expert_of_rank: (R,) int64, the
    column of the gates each rank component is multiplied by; None for a slot without experts.
    """

    a: Tensor | None = None
    b: Tensor | None = None
    rank_scale: Tensor | None = None
    delta_scale: Tensor | None = None
    out_scale: Tensor | None = None
    out_shift: Tensor | None = None
    in_scale: Tensor | None = None
    expert_of_rank: Tensor | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensors, shared ones included."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())

    def tensors(self) -> list[Tensor]:
        """Return the tensors that are not None."""
        scales = (self.rank_scale, self.delta_scale, self.out_scale, self.out_shift, self.in_scale)
        fields = (self.a, self.b, *scales, self.expert_of_rank)
        return [tensor for tensor in fields if tensor is not None]


def by_columns(b: Tensor) -> Tensor:
    """Return b (O, R) with each column in one piece of memory, as kernels read it; b itself when it is so already."""
    return b if b.stride(0) == 1 else b.t().contiguous().t()


@dataclass(frozen=True, slots=True)
class Segments:
    """How the tokens of a step are cut: consecutive runs that use the same slot.

    owner: one slot per segment, -1 for the base model; sizes_tokens: tokens per segment, zero allowed, in order.
    """

    owner: tuple[int, ...]
    sizes_tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Member:
    """One of the linears that are packed side by side and read the same x: columns [start, start + width) of y.

    slots: one SlotWeights per slot, None where the slot leaves this linear alone; a live list, read at every call.
    """

    start: int
    width: int
    slots: Sequence[SlotWeights | None]


@dataclass(frozen=True, slots=True)
class Kernel:
    """One implementation of the formula, in two parts around the product with the base weight.

    scale_inputs(x, segments=, slots=) returns u (T, H) for one linear; x itself when no segment scales its input.
    apply_deltas_(y, x, segments=, members=, gates=None) turns y (T, O_total) = W u + bias into the result, in place.
    x: (T, H), not scaled; gates: (T, K) float32, ones when None.
    reads(segments=, members=) tells what apply_deltas_ will read: (N, 2) int64, addresses and numbers of 64-byte lines,
    for a product that can have them fetched; None where nothing is to be said. What a row gets does not depend on the
    order of the segments: it is bit-identical under permutation.
    """

    name: str
    scale_inputs: Callable[..., Tensor]
    apply_deltas_: Callable[..., None]
    reads: Callable[..., Tensor | None] = lambda **_: None
