"""Stack several adapters into one: their weighted sum, or experts whose weights a gate gives per token.

Where an adapter adds B A x to a linear, a weighted sum is exact without any decomposition: the ranks of the members lie
side by side, and everything that belongs to one member is multiplied into its B. LoRA, rsLoRA, AdaLoRA and VeRA add so.
DoRA and IA3 scale what the base computes; a sum of them is defined nowhere, so they are refused by name.

Knows views and tensors. Does not know names, requests or slots. Sources: PEFT 0.21.2, `add_weighted_adapter` with
`combination_type="cat"` (https://github.com/huggingface/peft, Apache-2.0), for the sum; X-LoRA,
https://arxiv.org/abs/2402.07148, section 2.1, for experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from adapterhub.base import Base
from adapterhub.errors import AdapterLoadError
from server.engine.loader import LoadedAdapter, load_adapter
from server.engine.types import MAX_STACKED_RANK
from server.kernels import SlotWeights, by_columns

__all__ = ["load_experts", "load_mix"]


def load_mix(parts: Sequence[tuple[Path, float]], base: Base, model: nn.Module) -> LoadedAdapter:
    """Load the sum of weight * adapter over (view, weight) pairs; one adapter of weight 1 is that adapter.

    Raises what `load_adapter` raises, and AdapterLoadError for a member that cannot be summed and for too many ranks.
    """
    members = [load_adapter(view, base, model) for view, _ in parts]
    if len(parts) == 1 and parts[0][1] == 1:
        return members[0]
    _check_additive([view for view, _ in parts], members, verb="mixed")
    return _stack(members, [weight for _, weight in parts], are_experts=False)


def load_experts(views: Sequence[Path], base: Base, model: nn.Module) -> LoadedAdapter:
    """Load adapters as experts: what view i adds is multiplied by column i of the gates of a step, per token.

    Raises what `load_mix` raises.
    """
    members = [load_adapter(view, base, model) for view in views]
    _check_additive(views, members, verb="gated")
    return _stack(members, [1.0] * len(members), are_experts=True)


def _check_additive(views: Sequence[Path], members: Sequence[LoadedAdapter], *, verb: str) -> None:
    for view, member in zip(views, members, strict=True):
        for method in member.methods:
            if not method.is_additive:
                raise AdapterLoadError(
                    f"The {method} adapter in {view.name!r} cannot be {verb}: it scales what the base computes, so no "
                    "weighted sum with it is defined.",
                    "Use it alone with weight 1, or train the task with lora, adalora or vera.",
                )


def _stack(members: Sequence[LoadedAdapter], weights: Sequence[float], *, are_experts: bool) -> LoadedAdapter:
    names = sorted({name for member in members for name in member.modules})
    modules = {
        name: _stack_module(
            name,
            [(idx, member.modules[name]) for idx, member in enumerate(members) if name in member.modules],
            weights,
            are_experts=are_experts,
        )
        for name in names
    }
    return LoadedAdapter(
        base_digest=members[0].base_digest,
        methods=tuple(method for member in members for method in member.methods),
        modules=modules,
        size_bytes=sum(one.size_bytes for one in modules.values()),
        num_experts=len(members) if are_experts else 0,
    )


def _stack_module(
    name: str, members: Sequence[tuple[int, SlotWeights]], weights: Sequence[float], *, are_experts: bool
) -> SlotWeights:
    """Return A (sum of R, H) and B (O, sum of R) of the members that change this linear, given with their index."""
    a: list[Tensor] = []
    b: list[Tensor] = []
    for idx, member in members:
        assert member.a is not None
        a.append(member.a)
        b.append(_folded_b(member) * weights[idx])
    ranks = [one.shape[0] for one in a]
    if sum(ranks) > MAX_STACKED_RANK:
        listed = " + ".join(str(rank) for rank in ranks)
        raise AdapterLoadError(
            f"Stacked in {name!r}, the members have rank {sum(ranks)} ({listed}); the limit is {MAX_STACKED_RANK}.",
            "Combine fewer adapters, or adapters of lower rank.",
        )
    expert_of_rank = None
    if are_experts:
        experts = torch.tensor([idx for idx, _ in members], device=a[0].device)
        expert_of_rank = experts.repeat_interleave(torch.tensor(ranks, device=a[0].device))
    return SlotWeights(a=torch.cat(a), b=by_columns(torch.cat(b, dim=1)), expert_of_rank=expert_of_rank)


def _folded_b(member: SlotWeights) -> Tensor:
    """Return diag(delta_scale) B diag(rank_scale), (O, R): what stands on the left of A x."""
    assert member.b is not None
    b = member.b
    if member.rank_scale is not None:
        b = b * member.rank_scale
    return b if member.delta_scale is None else b * member.delta_scale[:, None]
