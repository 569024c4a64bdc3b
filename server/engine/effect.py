"""How much an adapter changes each linear of the base, in closed form: the change itself is never written down.

Knows the terms of the serving formula and the layers of the model. Does not know files or requests. Sizes are Frobenius
norms of the change of the weight; what IA3 does to a bias is not part of them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from adapterhub.records import EffectReport, Method, ModuleEffect
from server.kernels import SlotWeights
from server.layers import serving_weight

__all__ = ["measure_effect", "row_terms"]


def measure_effect(
    method: Method,
    modules: Mapping[str, SlotWeights],
    *,
    scales: Mapping[str, float | None],
    model: nn.Module,
    unmatched_targets: tuple[str, ...],
    num_linears: int,
    num_pruned: int,
) -> EffectReport:
    """Measure an adapter. scales: factor on B A by module; num_linears: linears of the base an adapter may change."""
    effects: dict[str, ModuleEffect] = {}
    changes: list[float] = []
    norms: list[float] = []
    grams: dict[tuple[int, torch.Size], Tensor] = {}
    for name, weights in modules.items():
        layer = model.get_submodule(name)
        changes.append(_change_norm(weights, layer, grams))
        norms.append(_weight_norm(layer))
        rank = 0 if weights.a is None else weights.a.shape[0]
        effects[name] = ModuleEffect(rank=rank, scale=scales[name], relative_size=_ratio(changes[-1], norms[-1]))
    sizes = [effect.relative_size for effect in effects.values()]
    return EffectReport(
        method=method,
        modules=effects,
        unmatched_targets=unmatched_targets,
        num_untouched=num_linears - len(modules) - num_pruned,
        num_pruned=num_pruned,
        max_relative_size=max(sizes),
        median_relative_size=statistics.median(sizes),
        total_relative_size=_ratio(math.hypot(*changes), math.hypot(*norms)),
    )


def row_terms(weight: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ||W_i||^2, W_i . (B A)_i and ||(B A)_i||^2 per row, each (O,) float64, without forming B A.

        weight: (O, H), a: (R, H), b: (O, R)
        W_i . (B A)_i = b_i . (A W_i^T);  ||(B A)_i||^2 = b_i (A A^T) b_i^T

    Summed in float64, because the terms may cancel.
    """
    a64, b64 = a.to(torch.float64), b.to(torch.float64)
    squares = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float64).square()
    cross = ((weight @ a.t()).to(torch.float64) * b64).sum(dim=1)
    own = ((b64 @ (a64 @ a64.t())) * b64).sum(dim=1)
    return squares, cross, own


def _change_norm(weights: SlotWeights, layer: nn.Module, grams: dict[tuple[int, torch.Size], Tensor]) -> float:
    """Return ||change of W|| for any method. grams: A A^T of each A seen so far, because VeRA's modules share one."""
    if weights.a is None or weights.b is None:
        return _scaling_norm(weights, layer)
    if weights.out_scale is not None:
        return _dora_norm(weights.a, weights.b, weights.out_scale, layer)
    key = (weights.a.data_ptr(), weights.a.shape)
    if key not in grams:
        grams[key] = weights.a @ weights.a.t()
    b = weights.b if weights.rank_scale is None else weights.b * weights.rank_scale
    if weights.delta_scale is not None:
        b = b * weights.delta_scale[:, None]
    # ||B A||^2 = trace(B^T B A A^T): two matrices of R x R in place of one of O x H.
    square = ((b.t() @ b).to(torch.float64) * grams[key].to(torch.float64)).sum()
    return math.sqrt(max(0.0, float(square)))


def _dora_norm(a: Tensor, b: Tensor, out_scale: Tensor, layer: nn.Module) -> float:
    """Return ||c (W + B A) - W||; row i is (c_i - 1) W_i + c_i (B A)_i, whose terms are small where the change is."""
    squares, cross, own = row_terms(serving_weight(layer), a, b)
    scale = out_scale.to(torch.float64)
    square = ((scale - 1).square() * squares + 2 * scale * (scale - 1) * cross + scale.square() * own).sum()
    return math.sqrt(max(0.0, float(square)))


def _scaling_norm(weights: SlotWeights, layer: nn.Module) -> float:
    """Return ||W scaled - W|| of IA3, which scales the rows of W or its columns."""
    scale = weights.in_scale if weights.out_scale is None else weights.out_scale
    assert scale is not None
    dim = 0 if weights.out_scale is None else 1
    norms = torch.linalg.vector_norm(serving_weight(layer), dim=dim, dtype=torch.float64)
    return float(torch.linalg.vector_norm((scale.to(torch.float64) - 1) * norms))


def _weight_norm(layer: nn.Module) -> float:
    return float(torch.linalg.vector_norm(serving_weight(layer), dtype=torch.float64))


def _ratio(change: float, norm: float) -> float:
    """Return change / norm; a weight of zeros that is changed at all counts as doubled."""
    return change / norm if norm > 0 else float(change > 0)
