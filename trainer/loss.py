"""Next-token loss that computes logits only where there is a label.

In the shipped tasks most tokens are prompt, and the output head is a fifth of a small model. The hidden states of
labelled positions are gathered before the head runs; the head itself, with whatever scaling or capping the model does,
is the model's own code. Loss is a sum over target tokens, divided once per step by the caller.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn import functional

from trainer.data.tokens import IGNORED

__all__ = ["label_loss"]


def label_loss(model: Any, inputs: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """Return (sum of -log p(label), number of labels), sum () float32 with gradients.

    model: a transformers causal model, or a PeftModel around one. inputs: input_ids, attention_mask and labels, (B, T).
    Position t predicts label t + 1.
    """
    labels = inputs["labels"][:, 1:]
    is_target = labels != IGNORED
    with _gathered_hidden_states(model, is_target):
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
    targets = labels[is_target]
    return functional.cross_entropy(outputs.logits[0].float(), targets, reduction="sum"), targets.numel()


@contextmanager
def _gathered_hidden_states(model: Any, is_target: Tensor) -> Iterator[None]:
    """While open, the backbone of `model` hands only the hidden states at `is_target` to the head, as (1, N, H)."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model

    def gather(_module: Any, _args: Any, outputs: Any) -> Any:
        outputs.last_hidden_state = outputs.last_hidden_state[:, :-1][is_target].unsqueeze(0)
        return outputs

    handle = causal.base_model.register_forward_hook(gather)
    try:
        yield
    finally:
        handle.remove()
