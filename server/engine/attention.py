"""Attention over paged keys and values, for rows of any length in one step, as an attention function of transformers.

Knows positions and tensors. Does not know requests, adapters or the scheduler. transformers builds no mask for an
attention function that registers none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from adapterhub.errors import UserInputError
from server.engine.compiled_attention import CompiledAttention
from server.engine.paged_kv import HeadShape, PagedKV, RowSpan, indices
from server.engine.plain_attention import PlainAttention
from server.step_context import current_step

__all__ = ["ATTENTION_NAME", "AttentionProbe", "AttentionStep", "register_paged_attention", "step_attention"]

ATTENTION_NAME = "adapterhub_paged"
# Arguments with which transformers asks for another formula; ignoring one would answer wrongly.
_UNSUPPORTED = ("s_aux", "position_bias", "head_mask", "cache")


class AttentionProbe:
    """Stands in for AttentionStep while the runner asks what each attention layer stores and wants.

    shapes: what a layer would store per token; terms: what else its attention is asked for, by layer.
    """

    def __init__(self) -> None:
        self.shapes: dict[int, HeadShape] = {}
        self.terms: dict[int, dict[str, Any]] = {}

    def run(self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, **terms: Any) -> Tensor:
        """Note the call and return (1, T, query heads, value dim): some mixture of all three, token by token."""
        self.shapes[layer_idx] = HeadShape(key.shape[1], key.shape[3], value.shape[3])
        self.terms[layer_idx] = terms
        group = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(group, dim=1) for tensor in (key, value))
        weights = (query * key).mean(dim=-1, keepdim=True).tanh()
        return (weights * value).transpose(1, 2).contiguous()


class AttentionStep:
    """The attention of one step; built once, used by every layer."""

    def __init__(self, kv: PagedKV, rows: Sequence[RowSpan]) -> None:
        self._kv = kv
        self._rows = rows
        self._compiled = None if kv.library is None else CompiledAttention(kv, rows, kv.library)
        self._plain: PlainAttention | None = None
        size = kv.block_tokens
        places = [
            row.block_ids[position // size] * size + position % size
            for row in rows
            for position in range(row.start, row.context_tokens)
        ]
        self._places = indices(places, kv)
        self._begun = indices([place // size for place in places if place % size == 0], kv)

    def run(
        self,
        layer_idx: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """Store the new keys and values and return the attended values (1, T, query heads, value dim).

        query: (1, query heads, T, dim); key, value: (1, heads, T, dim). window: how many positions a token sees, itself
        included; softcap: the scores are softcap * tanh(score / softcap); None for neither.
        """
        self._kv.write_(layer_idx, self._places, key, value, begun=self._begun)
        output = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
        if self._compiled is not None and self._compiled.can_run(query, value.shape[3]):
            self._compiled.run_(output, layer_idx, query, window=window, scale=scale, softcap=softcap)
            return output
        if self._plain is None:
            self._plain = PlainAttention(self._kv, self._rows)
        self._plain.run_(output, layer_idx, query, key, value, scale=scale, window=window, softcap=softcap)
        return output


def step_attention() -> AttentionStep | AttentionProbe:
    """Return the attention of the step in progress. Raises RuntimeError when there is none."""
    step = current_step()
    if step is None or step.attention is None:
        raise RuntimeError("The model attends outside a step. Use `Runner.step`, which owns its keys and values.")
    return step.attention


def _paged_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Run the attention of `module` for the step in progress; the signature is that of transformers."""
    del attention_mask  # Always None: this function registers no mask.
    attention = step_attention()
    if not getattr(module, "is_causal", True) or kwargs.get("is_causal") is False:
        raise UserInputError(
            f"{type(module).__name__} attends to later tokens, which this server does not compute.",
            "Serve a model with plain causal attention.",
        )
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise UserInputError(
                f"{type(module).__name__} attends with {name!r}, which this server does not compute.",
                "Serve a model with plain causal attention.",
            )
    scale = kwargs.get("scaling")
    terms = {
        "scale": query.shape[-1] ** -0.5 if scale is None else scale,
        "window": kwargs.get("sliding_window"),
        "softcap": kwargs.get("softcap"),
    }
    return attention.run(int(module.layer_idx), query, key, value, **terms), None  # pyright: ignore[reportArgumentType]  # Set by transformers.


def register_paged_attention() -> None:
    """Make ATTENTION_NAME known to transformers; repeating it is harmless."""
    AttentionInterface.register(ATTENTION_NAME, _paged_attention)
