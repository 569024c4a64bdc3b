"""Guards that keep a run from being a silent no-op.

Traps of TRL 1.16 with PEFT 0.21 and bitsandbytes 0.50: trainable parameters of a 4-bit base are cast to bfloat16, whose
step near 1.0 swallows IA3's updates; bitsandbytes repacks weights in the first evaluation on some CPUs and then gives
no gradients; a tensor that no gradient reaches stays as it was, without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from adapterhub.errors import TrainingError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["check_all_moved", "keep_float32_", "snapshot", "stop_repacking_"]

_MAX_NAMES_SHOWN = 5


def keep_float32_(model: torch.nn.Module) -> int:
    """Cast every trainable parameter to float32 in place and return their number of values. Raises without any."""
    num_values = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            num_values += parameter.numel()
    if not num_values:
        raise TrainingError("The adapter has no trainable parameter.", "Check `training.target_modules`.")
    return num_values


def stop_repacking_(model: torch.nn.Module) -> None:
    """Forbid bitsandbytes to repack 4-bit weights for AVX512-BF16; call it before the model evaluates anything.

    Repacked layers pass no gradients to what lies below them. Raises TrainingError when it has already happened.
    """
    for name, module in model.named_modules():
        layer: Any = module
        if not hasattr(layer, "support_avx512bf16_for_cpu"):
            continue
        if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            raise TrainingError(
                f"The 4-bit weights of {name} were repacked by an evaluation, so no gradient passes them.",
                "Load the base again and call `stop_repacking_` before the first evaluation.",
            )
        layer.support_avx512bf16_for_cpu = False


def snapshot(model: torch.nn.Module) -> dict[str, Tensor]:
    """Copy the trainable parameters by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def check_all_moved(model: torch.nn.Module, before: Mapping[str, Tensor], *, pruned: frozenset[str]) -> None:
    """Raise TrainingError naming the trainable tensors that are equal to `before` or not finite.

    pruned: names of AdaLoRA's E vectors that the schedule set to zero as a whole; they may equal their start.
    """
    import torch

    now: dict[str, Any] = dict(model.named_parameters())
    still = [name for name, old in before.items() if name not in pruned and torch.equal(now[name].detach(), old)]
    broken = [name for name in before if not torch.isfinite(now[name]).all()]
    if broken:
        raise TrainingError(
            f"{len(broken)} of {len(before)} trained tensors hold NaN or infinity: {_some(broken)}.",
            "Lower `training.learning_rate` or `training.max_grad_norm`.",
        )
    if still:
        raise TrainingError(
            f"{len(still)} of {len(before)} trainable tensors did not move: {_some(still)}.",
            "Check `training.learning_rate`, `training.max_steps` and the data; the adapter would be partly a no-op.",
        )


def _some(names: list[str]) -> str:
    rest = len(names) - _MAX_NAMES_SHOWN
    return ", ".join(names[:_MAX_NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
