"""A linear of the base model that also applies the adapters of the step, and the wrapping of a whole model.

Knows tensors, slots and the current step. Does not know adapter files, methods or requests. The product with the base
weight always goes through the wrapped layer, so any layer that behaves like `torch.nn.Linear` can stay quantized.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import cast

import torch
from torch import Tensor, nn

from adapterhub.errors import AdapterMismatchError
from server.kernels import Kernel, Member, SlotWeights
from server.step_context import current_step

__all__ = ["AdapterLinear", "serving_bias", "serving_weight", "wrap_linears"]


def _is_linear4bit(layer: nn.Module) -> bool:
    # By name: importing bitsandbytes only to ask costs seconds, and the layer exists only when it is already imported.
    return any(kind.__name__ == "Linear4bit" for kind in type(layer).__mro__)


def serving_weight(layer: nn.Module) -> Tensor:
    """Return the weight (O, H) float32 with which `layer` multiplies: dequantized when it is stored in 4 bits."""
    layer = layer.base_layer if isinstance(layer, AdapterLinear) else layer
    weight = cast("Tensor", layer.weight)
    if _is_linear4bit(layer):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state).to(torch.float32)  # pyright: ignore[reportAttributeAccessIssue]  # Params4bit
    return weight.data.to(torch.float32)


def serving_bias(layer: nn.Module) -> Tensor | None:
    """Return the bias (O,) float32 that `layer` adds, or None."""
    layer = layer.base_layer if isinstance(layer, AdapterLinear) else layer
    bias = cast("Tensor | None", layer.bias)
    return None if bias is None else bias.data.to(torch.float32)


class AdapterLinear(nn.Module):
    """`base_layer` plus, per slot, what an adapter adds to it."""

    def __init__(self, base_layer: nn.Module, *, num_slots: int, kernel: Kernel) -> None:
        super().__init__()
        if _is_linear4bit(base_layer):
            # On CPUs with AVX512-BF16 the first call without gradients would repack the weight and round its scales to
            # bfloat16, so that serving and training see different values (bitsandbytes 0.50, nn/modules.py).
            setattr(base_layer, "support_avx512bf16_for_cpu", False)  # noqa: B010  # pyright sees only nn.Module here.
        self.base_layer = base_layer
        self._kernel = kernel
        self._slots: list[SlotWeights | None] = [None] * num_slots

    @property
    def slots(self) -> tuple[SlotWeights | None, ...]:
        """What each slot holds; None where the adapter leaves this linear alone."""
        return tuple(self._slots)

    def write_slot(self, slot: int, weights: SlotWeights | None) -> None:
        """Replace what `slot` does here; None clears it."""
        self._slots[slot] = weights

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., T, O) for x (..., T, H) float32; without adapters in the step, exactly the base layer."""
        step = current_step()
        if step is None or step.segments is None:
            return self.base_layer(x)
        slots = self._slots
        if all(owner < 0 or slots[owner] is None for owner in step.segments.owner):
            return self.base_layer(x)
        rows = x.reshape(-1, x.shape[-1])
        y = self.base_layer(self._kernel.scale_inputs(rows, segments=step.segments, slots=slots))
        members = [Member(0, y.shape[-1], slots)]
        self._kernel.apply_deltas_(y, rows, segments=step.segments, members=members)
        return y.view(*x.shape[:-1], y.shape[-1])


def wrap_linears(
    model: nn.Module, names: Collection[str], *, num_slots: int, kernel: Kernel
) -> dict[str, AdapterLinear]:
    """Replace the linears called `names` in `model`, in place, and return the wrappers by name.

    Raises AdapterMismatchError when a name is no linear of the model.
    """
    layers: dict[str, AdapterLinear] = {}
    present = dict(model.named_modules())
    for name in names:
        layer = present.get(name)
        if not isinstance(layer, nn.Linear):
            found = "nothing" if layer is None else f"a {type(layer).__name__}"
            raise AdapterMismatchError(
                f"The base lists a linear {name!r}, but the loaded model has {found} there.",
                "Serve a decoder model whose projections are plain linears.",
            )
        layers[name] = AdapterLinear(layer, num_slots=num_slots, kernel=kernel)
        model.set_submodule(name, layers[name])
    return layers
