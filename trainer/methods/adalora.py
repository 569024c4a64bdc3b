# ruff: noqa: ARG002 - the parameters are those of the callback interface
"""Drive AdaLoRA: allocate ranks after each step, add the orthogonality term, and say which ranks are left.

TRL computes its loss from log-probabilities and never calls AdaLoRA's allocator, so without this driver AdaLoRA is LoRA
with extra parameters. Source: https://arxiv.org/abs/2303.10512, sections 3.1 (orthogonality) and 3.3 (budget).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from adapterhub.errors import TrainingError

__all__ = ["AdaLoraDriver", "fully_pruned", "orthogonality_loss"]


class AdaLoraDriver(TrainerCallback):
    """Update importance scores and cut ranks while the gradients of the step are still there."""

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Called after the optimizer stepped and before gradients are cleared."""
        kwargs["model"].base_model.update_and_allocate(state.global_step + 1)


def orthogonality_loss(model: Any) -> Tensor:
    """Mean over all A and B of ||P P^T - I||_F with P the (R, .) factor, times orth_reg_weight. () float32."""
    config = model.peft_config["default"]
    terms: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            gram = parameter @ parameter.T if "lora_A" in name else parameter.T @ parameter
            terms.append((gram - torch.eye(gram.shape[0], device=gram.device)).norm())
    return config.orth_reg_weight * torch.stack(terms).mean()


def fully_pruned(model: Any) -> frozenset[str]:
    """Names of the E vectors whose every rank was cut. Raises TrainingError when ranks were never allocated."""
    pattern = model.peft_config["default"].rank_pattern
    if not pattern:
        raise TrainingError(
            "AdaLoRA allocated no ranks.", "Raise `training.max_steps`; see `trainer/methods/configs.py`."
        )
    return frozenset(f"base_model.model.{name}" for name, kept in pattern.items() if not any(kept))
