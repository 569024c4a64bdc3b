"""Linears of the base model that also apply the adapters of the step, and the wrapping of a whole model.

Linears that read the same input (query, key and value; gate and up) are one product and one call of the kernel. Knows
tensors, slots and the current step. Does not know adapter files, methods or requests.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from itertools import accumulate
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from adapterhub.errors import AdapterMismatchError
from server.kernels import Kernel, Member, Segments, SlotWeights
from server.products import Product, ProductBuilder, linear_bias, linear_weight
from server.step_context import StepContext, current_step

__all__ = ["AdapterLinear", "LinearGroup", "find_groups", "serving_bias", "serving_weight", "wrap_linears"]

_LAYER_NUMBER = re.compile(r"\.(\d+)\.")


def serving_weight(layer: nn.Module) -> Tensor:
    """Return the weight (O, H) float32 with which `layer` multiplies: dequantized when it is stored in fewer bits."""
    return layer.group.weight(layer.index) if isinstance(layer, AdapterLinear) else linear_weight(layer)


def serving_bias(layer: nn.Module) -> Tensor | None:
    """Return the bias (O,) float32 that `layer` adds, or None."""
    return layer.bias if isinstance(layer, AdapterLinear) else linear_bias(layer)


class LinearGroup:
    """Linears with one input, as one product, plus what each slot's adapter adds to them.

    widths: outputs per member; biases: per member, (O,) or None; product: x (T, H) -> fresh y (T, sum of widths), bias
    included; layer_idx: the decoder layer they belong to, which chooses the gates, or None.
    """

    def __init__(
        self,
        product: Product,
        widths: Sequence[int],
        *,
        biases: Sequence[Tensor | None],
        num_slots: int,
        kernel: Kernel,
        layer_idx: int | None = None,
    ) -> None:
        starts = [0, *accumulate(widths)][:-1]
        self.widths = tuple(widths)
        self.biases = biases
        self._slots: list[list[SlotWeights | None]] = [[None] * num_slots for _ in widths]
        self._members = [Member(*place) for place in zip(starts, widths, self._slots, strict=True)]
        self._product = product
        self._kernel = kernel
        self._layer_idx = layer_idx
        self._scaled: set[int] = set()  # Slots that scale an input.
        self._used: set[int] = set()  # Slots that change anything here.
        self._x: Tensor | None = None
        self._y: Tensor | None = None
        self._waiting: set[int] = set()  # Members whose part of y nobody has asked for yet.

    def weight(self, index: int) -> Tensor:
        """Return the weight (O, H) float32 of one member."""
        member = self._members[index]
        return self._product.weight(slice(member.start, member.start + member.width))

    def slots(self, index: int) -> tuple[SlotWeights | None, ...]:
        """Return what each slot holds at one member."""
        return tuple(self._slots[index])

    def write_slot(self, index: int, slot: int, weights: SlotWeights | None) -> None:
        """Replace what `slot` does at one member; None clears it."""
        self._slots[index][slot] = weights
        held = [found for column in self._slots if (found := column[slot]) is not None]
        for kept, is_in in ((self._used, bool(held)), (self._scaled, any(one.in_scale is not None for one in held))):
            (kept.add if is_in else kept.discard)(slot)

    def output(self, index: int, x: Tensor) -> Tensor:
        """Return y (..., O) of one member for x (..., H) float32.

        The members of a group are asked one after the other with the very same tensor; the first answers for all. One
        that asks again begins anew: a pass that failed halfway leaves no answer to the next.
        """
        if x is not self._x or index not in self._waiting:
            rows = x.reshape(-1, x.shape[-1])
            self._x, self._y = x, self.run(rows).view(*x.shape[:-1], -1)
            self._waiting = set(range(len(self._members)))
        y = cast("Tensor", self._y)
        self._waiting.discard(index)
        if not self._waiting:
            self._x = self._y = None
        member = self._members[index]
        return y[..., member.start : member.start + member.width]

    def run(self, x: Tensor) -> Tensor:
        """Return a fresh y (T, sum of widths), the outputs of all members side by side, for x (T, H) float32."""
        step = current_step()
        owners = () if step is None or step.segments is None else step.segments.owner
        if step is None or self._used.isdisjoint(owners):
            return self._product(x)
        ahead = self._kernel.reads(segments=step.segments, members=self._members)
        y = self._product(x, ahead) if self._scaled.isdisjoint(owners) else self._scaled_product(x, step, ahead)
        gates = None if step.gates is None or self._layer_idx is None else step.gates[:, self._layer_idx]
        self._kernel.apply_deltas_(y, x, segments=step.segments, members=self._members, gates=gates)
        return y

    def _scaled_product(self, x: Tensor, step: StepContext, ahead: Tensor | None) -> Tensor:
        """Return the product (T, O) of inputs that some slot scales; each member may scale its own.

        Rows whose slot scales nothing share one product; the others have one per member.
        """
        segments = cast("Segments", step.segments)
        scaled = [self._kernel.scale_inputs(x, segments=segments, slots=member.slots) for member in self._members]
        if len(scaled) == 1:
            return self._product(scaled[0], ahead)
        ends = accumulate(segments.sizes_tokens)
        rows = [
            row
            for owner, size, end in zip(segments.owner, segments.sizes_tokens, ends, strict=True)
            if owner in self._scaled
            for row in range(end - size, end)
        ]
        y = self._product(x, ahead) if len(rows) < x.shape[0] else x.new_empty(x.shape[0], sum(self.widths))
        chosen = torch.tensor(rows, device=x.device)
        for member, u in zip(self._members, scaled, strict=True):
            columns = slice(member.start, member.start + member.width)
            y[chosen, columns] = self._product(u[chosen])[:, columns]
        return y


class AdapterLinear(nn.Module):
    """One linear of a model: a member of its group."""

    def __init__(self, group: LinearGroup, index: int) -> None:
        super().__init__()
        self.group = group
        self.index = index
        self.bias = group.biases[index]

    @property
    def slots(self) -> tuple[SlotWeights | None, ...]:
        """What each slot holds; None where the adapter leaves this linear alone."""
        return self.group.slots(self.index)

    def write_slot(self, slot: int, weights: SlotWeights | None) -> None:
        """Replace what `slot` does here; None clears it."""
        self.group.write_slot(self.index, slot, weights)

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., T, O) for x (..., T, H) float32."""
        return self.group.output(self.index, x)


@torch.inference_mode()
def find_groups(model: PreTrainedModel, names: Collection[str]) -> list[list[str]]:
    """Return the linears called `names`, in groups that are given the very same tensor one after the other.

    Runs one token through the model and looks. Raises AdapterMismatchError when a name is no linear of the model.
    """
    layers = {name: _linear(model, name) for name in names}
    called: list[tuple[str, Tensor]] = []

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _layer, inputs: called.append((name, inputs[0]))

    hooks = [layer.register_forward_pre_hook(note(name)) for name, layer in layers.items()]
    model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    groups: list[list[str]] = []
    last: Tensor | None = None
    for name, x in called:
        if x is last and type(layers[name]) is type(layers[groups[-1][-1]]) and name not in groups[-1]:
            groups[-1].append(name)
        else:
            groups.append([name])
        last = x
    seen = [name for group in groups for name in group]
    if len(set(seen)) == len(seen):
        return groups + [[name] for name in names if name not in seen]
    return [[name] for name in names]  # A linear that runs twice per pass belongs to no group.


def _linear(model: nn.Module, name: str) -> nn.Linear:
    layer = dict(model.named_modules()).get(name)
    if isinstance(layer, nn.Linear):
        return layer
    found = "nothing" if layer is None else f"a {type(layer).__name__}"
    raise AdapterMismatchError(
        f"The base lists a linear {name!r}, but the loaded model has {found} there.",
        "Serve a decoder model whose projections are plain linears.",
    )


def wrap_linears(
    model: PreTrainedModel,
    names: Collection[str],
    *,
    num_slots: int,
    kernel: Kernel,
    build_product: ProductBuilder,
) -> dict[str, AdapterLinear]:
    """Replace the linears called `names` in `model`, in place, and return the wrappers by name.

    build_product: makes the product of the linears of one group; see `server.products`.
    """
    wrapped: dict[str, AdapterLinear] = {}
    for group_names in find_groups(model, names):
        layers = [_linear(model, name) for name in group_names]
        number = _LAYER_NUMBER.search(group_names[0])
        group = LinearGroup(
            build_product(layers),
            [layer.out_features for layer in layers],
            biases=[linear_bias(layer) for layer in layers],
            num_slots=num_slots,
            kernel=kernel,
            layer_idx=int(number[1]) if number else None,
        )
        for index, name in enumerate(group_names):
            wrapped[name] = AdapterLinear(group, index)
            model.set_submodule(name, wrapped[name])
    return wrapped
