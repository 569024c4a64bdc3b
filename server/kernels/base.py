"""The one formula that serves every adapter method, and the signature of the kernels that compute it.

For token t that uses slot z, at one linear with base weight W and bias:

    u = x * in_scale
    y = out_scale * (W u + delta_scale * (B ((A x) * rank_scale))) + bias

| method       | A, B   | rank_scale | delta_scale | out_scale               | in_scale |
|--------------|--------|------------|-------------|-------------------------|----------|
| LoRA, rsLoRA | own    | scale      | .           | .                       | .        |
| AdaLoRA      | own    | E * scale  | .           | .                       | .        |
| VeRA         | shared | d          | b           | .                       | .        |
| DoRA         | own    | scale      | .           | m / ||W + scale B A||   | .        |
| IA3          | none   | .          | .           | l, on the bias as well  | or l     |

A dot stands for ones. Sources: LoRA https://arxiv.org/abs/2106.09685, rsLoRA https://arxiv.org/abs/2312.03732, AdaLoRA
https://arxiv.org/abs/2303.10512, VeRA https://arxiv.org/abs/2310.11454, DoRA https://arxiv.org/abs/2402.09353, IA3
https://arxiv.org/abs/2205.05638. Batching by segments: Punica, https://arxiv.org/abs/2310.18547.

Knows tensors and segments. Does not know requests, adapter names, models or HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Kernel", "Segments", "SlotWeights"]


@dataclass(frozen=True, slots=True, eq=False)
class SlotWeights:
    """What one slot does at one linear; None stands for ones, and for no low-rank part when `a` is None.

    a: (R, H); b: (O, R); rank_scale: (R,); delta_scale, out_scale, out_shift: (O,); in_scale: (H,); all in the dtype
    of the activations. out_shift is added at the end: it takes back what out_scale did to the bias of the base layer
    for methods that leave the bias alone.
    """

    a: Tensor | None = None
    b: Tensor | None = None
    rank_scale: Tensor | None = None
    delta_scale: Tensor | None = None
    out_scale: Tensor | None = None
    out_shift: Tensor | None = None
    in_scale: Tensor | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensors, shared ones included."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())

    def tensors(self) -> list[Tensor]:
        """Return the tensors that are not None."""
        fields = (self.a, self.b, self.rank_scale, self.delta_scale, self.out_scale, self.out_shift, self.in_scale)
        return [tensor for tensor in fields if tensor is not None]


@dataclass(frozen=True, slots=True)
class Segments:
    """How the tokens of a step are cut: consecutive runs that use the same slot.

    owner: one slot per segment, -1 for the base model; sizes_tokens: tokens per segment, zero allowed, in order.
    """

    owner: tuple[int, ...]
    sizes_tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Kernel:
    """One implementation of the formula, in two parts around the product with the base weight.

    scale_inputs(x, segments=, slots=) returns u (T, H); x itself when no segment scales its input.
    apply_deltas_(y, x, segments=, slots=) turns y (T, O) = W u + bias into the result, in place. x: (T, H), not scaled.
    slots: one SlotWeights per slot, None where the slot leaves this linear alone.
    """

    name: str
    scale_inputs: Callable[..., Tensor]
    apply_deltas_: Callable[..., None]

    def run(
        self,
        base_product: Callable[[Tensor], Tensor],
        x: Tensor,
        *,
        segments: Segments,
        slots: Sequence[SlotWeights | None],
    ) -> Tensor:
        """Return y (T, O) for x (T, H); base_product maps u (T, H) to a fresh tensor W u + bias (T, O)."""
        y = base_product(self.scale_inputs(x, segments=segments, slots=slots))
        self.apply_deltas_(y, x, segments=segments, slots=slots)
        return y
