"""Decoder layers of Llama's shape in nine compiled calls instead of some sixty small operations.

A layer is replaced only where it has that shape and the calls give the numbers of the original on a probe; every other
layer stays what transformers made it. Knows modules of transformers and the step in progress; no slots or requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from server.engine.attention import AttentionProbe, step_attention
from server.kernels.native import Library
from server.layers import AdapterLinear, LinearGroup
from server.norms import CompiledNorm
from server.step_context import StepContext, step_context

__all__ = ["fuse_layers_"]

# Of each token's largest value: an order of sums may differ, a formula may not. In 8 bits a last digit that differs may
# round an activation to its neighbour.
_TOLERANCES = {"float32": 1e-5, "int8": 2e-3}
_PROBE_TOKENS = (5, 1, 7, 2, 3, 0)
_SILU = (nn.SiLU, type(ACT2FN["silu"]))


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a layer of this shape consists of; terms: what its attention is asked for beside the tensors."""

    library: Library
    first_norm: CompiledNorm
    qkv: LinearGroup
    out: LinearGroup
    second_norm: CompiledNorm
    gate_up: LinearGroup
    down: LinearGroup
    layer_idx: int
    head_dim: int
    terms: Mapping[str, Any]


class _FusedLayer:
    def __init__(self, parts: _Parts) -> None:
        self._parts = parts
        q, k, v = parts.qkv.widths
        self._starts = (0, q, q + k, q + k + v)
        self.head_dim = parts.head_dim

    def __call__(self, hidden_states: Tensor, *, position_embeddings: tuple[Tensor, Tensor], **unused: Any) -> Tensor:
        """Return the hidden states (1, T, H) after this layer; position_embeddings: cosines, sines (1, T, dim)."""
        del unused  # Masks and caches: the step in progress has its own.
        parts = self._parts
        x = hidden_states[0]
        attended = self._attend(parts.qkv.run(parts.first_norm(x)), *position_embeddings)
        x, normed = parts.second_norm.add(x, parts.out.run(attended))
        gates = parts.gate_up.run(normed)
        active = torch.empty(gates.shape[0], gates.shape[1] // 2)
        library = parts.library
        library.silu_product(active.data_ptr(), gates.data_ptr(), *active.shape, library.num_threads)
        return parts.down.run(active).add_(x)[None]

    def _attend(self, qkv: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """Return the attended values (T, heads * dim) of queries, keys and values side by side (T, Q + K + V)."""
        parts = self._parts
        num_tokens, dim, library = qkv.shape[0], parts.head_dim, parts.library
        num_rotated = self._starts[2] // dim
        tables = (cosines.contiguous(), sines.contiguous())
        pointers = (qkv.data_ptr(), tables[0].data_ptr(), tables[1].data_ptr())
        rotary_dim = cosines.shape[-1]
        library.rotate(*pointers, num_tokens, num_rotated, dim, rotary_dim, qkv.stride(0), library.num_threads)
        heads = qkv.view(1, num_tokens, -1, dim).transpose(1, 2)
        ends = [start // dim for start in self._starts]
        query, key, value = (heads[:, start:end] for start, end in pairwise(ends))
        return step_attention().run(parts.layer_idx, query, key, value, **parts.terms).view(num_tokens, -1)


@torch.inference_mode()
def fuse_layers_(model: PreTrainedModel, library: Library, *, compute: str) -> int:
    """Replace the forward pass of every decoder layer of Llama's shape, in place, and return how many.

    compute: what the products of `model` compute in; see `server.products.Compute`.
    """
    candidates = [module for module in model.modules() if _has_shape(module)]
    calls: dict[nn.Module, tuple[Any, ...]] = {}

    def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls[layer] = (args, kwargs, output)

    hooks = [layer.register_forward_hook(note, with_kwargs=True) for layer in candidates]
    probe = AttentionProbe()
    positions = torch.arange(len(_PROBE_TOKENS))[None]
    with step_context(StepContext(None, probe)):
        model(input_ids=torch.tensor([_PROBE_TOKENS]), position_ids=positions, use_cache=False)
    for hook in hooks:
        hook.remove()
    fused: list[tuple[nn.Module, _FusedLayer]] = []
    for layer, call in calls.items():
        found = _FusedLayer(_parts(layer, library, probe.terms))
        if _agrees(found, call, tolerance=_TOLERANCES[compute]):
            fused.append((layer, found))
    for layer, found in fused:
        setattr(layer, "forward", found)  # noqa: B010  # pyright sees the method of the class.
    return len(fused)


def _agrees(fused: _FusedLayer, call: tuple[Any, ...], *, tolerance: float) -> bool:
    args, kwargs, expected = call
    if len(args) != 1 or not isinstance(expected, Tensor) or "position_embeddings" not in kwargs:
        return False
    cosines = kwargs["position_embeddings"][0]
    if cosines.dim() != 3 or cosines.shape[0] != 1 or cosines.shape[-1] > fused.head_dim:
        return False
    with step_context(StepContext(None, AttentionProbe())):
        found = fused(*args, **kwargs)
    return bool(((found - expected).abs().amax(dim=-1) <= tolerance * expected.abs().amax(dim=-1)).all())


def _has_shape(layer: nn.Module) -> bool:
    """Tell whether a layer has the parts of Llama's, with projections that are products of their own."""
    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    norms = (getattr(layer, "input_layernorm", None), getattr(layer, "post_attention_layernorm", None))
    if attention is None or mlp is None or not all(isinstance(norm, CompiledNorm) for norm in norms):
        return False
    return (
        isinstance(getattr(mlp, "act_fn", None), _SILU)
        and isinstance(getattr(attention, "head_dim", None), int)
        and _is_group(attention, ("q_proj", "k_proj", "v_proj"))
        and _is_group(attention, ("o_proj",))
        and _is_group(mlp, ("gate_proj", "up_proj"))
        and _is_group(mlp, ("down_proj",))
        and all(width % attention.head_dim == 0 for width in attention.q_proj.group.widths)
    )


def _is_group(owner: nn.Module, names: Sequence[str]) -> bool:
    """Tell whether the linears `names` are all the members of one group, in this order."""
    found = [getattr(owner, name, None) for name in names]
    if not all(isinstance(layer, AdapterLinear) for layer in found):
        return False
    layers = cast("list[AdapterLinear]", found)
    group = layers[0].group
    return len(group.widths) == len(names) and all(
        layer.group is group and layer.index == index for index, layer in enumerate(layers)
    )


def _parts(layer: Any, library: Library, terms: Mapping[int, Mapping[str, Any]]) -> _Parts:
    attention, mlp = layer.self_attn, layer.mlp
    return _Parts(
        library=library,
        first_norm=layer.input_layernorm,
        qkv=attention.q_proj.group,
        out=attention.o_proj.group,
        second_norm=layer.post_attention_layernorm,
        gate_up=mlp.gate_proj.group,
        down=mlp.down_proj.group,
        layer_idx=attention.layer_idx,
        head_dim=attention.head_dim,
        terms=terms[attention.layer_idx],
    )
