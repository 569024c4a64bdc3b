"""Read one adapter from its view and turn it into the tensors of the serving formula; refuse whatever is not certain.

Knows PEFT's files and the base model. Does not know slots, requests or the store. Every refusal names what is wrong:
an adapter that is loaded in part, or without effect, would answer wrongly with status 200.
Sources: PEFT 0.21.2 (https://github.com/huggingface/peft, Apache-2.0) for the meaning of every tensor; DoRA,
https://arxiv.org/abs/2402.09353, section 4.1, for the norm.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, assert_never, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from adapterhub.base import Base
from adapterhub.errors import AdapterLoadError, AdapterWeightsError, BaseMismatchError
from adapterhub.peft_format import AdapterConfig, ModuleTensors, TensorInfo, map_tensors, parse_adapter_config
from adapterhub.records import EffectReport, Method
from server.engine.effect import measure_effect, row_terms
from server.engine.projections import Projections, resident_projections
from server.kernels import SlotWeights, by_columns
from server.layers import serving_bias, serving_weight

__all__ = ["LoadedAdapter", "load_adapter"]

_BASE_FILE = "adapterhub.json"
_CONFIG_FILE = "adapter_config.json"
_WEIGHTS_FILE = "adapter_model.safetensors"
# A scale this close to one is one: float32 cannot tell m / ||W|| of an untrained DoRA from it.
_UNIT_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class LoadedAdapter:
    """An adapter on the device of the model, ready to be written into a slot.

    methods: one, or those of the members of a mix. modules: name of a linear -> what the adapter does there.
    size_bytes: its own tensors, without shared projections. projections: the VeRA projections it uses, kept alive here.
    measure: says how much it changes the base, which takes as long as loading; None for mixes and experts. num_experts:
    columns of the gates its rows read; 0 for an adapter without experts.
    """

    base_digest: str
    methods: tuple[Method, ...]
    modules: Mapping[str, SlotWeights]
    size_bytes: int
    projections: Projections | None = None
    measure: Callable[[], EffectReport] | None = None
    num_experts: int = 0


def load_adapter(view: Path, base: Base, model: nn.Module) -> LoadedAdapter:
    """Load the adapter in the folder `view` for `model`, which is `base` as it serves.

    Raises BaseMismatchError for another base, AdapterConfigError, AdapterMismatchError or AdapterWeightsError for an
    adapter that is not served, and AdapterLoadError for files that are missing or weights that change nothing.
    """
    _check_base(view, base)
    config = parse_adapter_config(_read_json(view / _CONFIG_FILE))
    device = next(model.parameters()).device
    tensors = _read_tensors(view / _WEIGHTS_FILE, device=device)
    infos = {name: TensorInfo(str(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}
    names = map_tensors(config, infos, base.modules)
    projections = None
    if config.method is Method.VERA:
        projections = resident_projections(config, tensors, sizes=[base.modules[module] for module in names])
    modules: dict[str, SlotWeights] = {}
    for module, roles in names.items():
        if config.method is Method.ADALORA and config.rank_of(module) == 0:
            continue  # Pruning left nothing here.
        parts = {role: tensors[name] for role, name in _named(roles)}
        shared = None if projections is None else projections.views(*base.modules[module])
        modules[module] = _build(config, module, parts, layer=model.get_submodule(module), shared=shared)
        _check_finite(modules[module].tensors(), what=f"what {module!r} adds to the base")
    _check_effect(view, config, modules)
    size_bytes = sum(_own_bytes(weights, projections) for weights in modules.values())
    measure = partial(_measure, config, modules, base=base, model=model, num_pruned=len(names) - len(modules))
    return LoadedAdapter(base.digest, (config.method,), modules, size_bytes, projections, measure)


def _check_base(view: Path, base: Base) -> None:
    recorded = _read_json(view / _BASE_FILE).get("base_digest")
    if recorded != base.digest:
        raise BaseMismatchError(
            f"The adapter in {view.name!r} was made for the base with digest {recorded!r}; this server runs "
            f"{base.name!r} ({base.quantization}) with digest {base.digest!r}.",
            "Serve the base it was trained on, or train it again on this one.",
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise AdapterLoadError(
            f"Cannot read {path.name!r} in {path.parent.name!r}: {exc}.",
            "A view of the store holds adapterhub.json, adapter_config.json and adapter_model.safetensors; run "
            "`hub adapters verify`, or import the folder with `hub adapters import`.",
        ) from exc
    return found if isinstance(found, dict) else {}


def _read_tensors(path: Path, *, device: torch.device) -> dict[str, Tensor]:
    """Read the tensors of a file as float32, onto `device`. Raises AdapterLoadError or AdapterWeightsError."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: cast("Tensor", file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as exc:
        raise AdapterLoadError(
            f"Cannot read {path.name!r} in {path.parent.name!r}: {exc}.", "Run `hub adapters verify`."
        ) from exc
    for name, tensor in tensors.items():
        _check_finite([tensor], what=f"tensor {name!r}")
    return {name: tensor.to(device, torch.float32) for name, tensor in tensors.items()}


def _check_finite(tensors: Iterable[Tensor], *, what: str) -> None:
    for tensor in tensors:
        num_bad = int((~torch.isfinite(tensor)).sum())
        if num_bad:
            raise AdapterWeightsError(
                f"In {what}, {num_bad} of {tensor.numel()} values are NaN or infinite.",
                "The training run diverged; lower the learning rate and train again.",
            )


def _named(roles: ModuleTensors) -> Iterable[tuple[str, str]]:
    fields = ("a", "b", "magnitude", "e", "vera_d", "vera_b", "ia3")
    return ((role, name) for role in fields if (name := getattr(roles, role)) is not None)


def _build(
    config: AdapterConfig,
    module: str,
    parts: Mapping[str, Tensor],
    *,
    layer: nn.Module,
    shared: tuple[Tensor, Tensor] | None,
) -> SlotWeights:
    """Turn the tensors of one module, by role, into the terms of the formula; shared: A and B of VeRA.

    rank_scale of LoRA, DoRA and AdaLoRA is multiplied into B here: float32 holds it, and a step saves one operation.
    """
    method = config.method
    match method:
        case Method.LORA:
            return SlotWeights(a=parts["a"], b=by_columns(parts["b"] * config.scale_of(module)))
        case Method.ADALORA:
            b = parts["b"] * (parts["e"].flatten() * config.scale_of(module))
            return SlotWeights(a=parts["a"], b=by_columns(b))
        case Method.DORA:
            return _build_dora(parts["a"], parts["b"] * config.scale_of(module), parts["magnitude"], layer=layer)
        case Method.IA3:
            scale = parts["ia3"].flatten()
            return SlotWeights(in_scale=scale) if config.is_feedforward(module) else SlotWeights(out_scale=scale)
        case Method.VERA:
            assert shared is not None
            return SlotWeights(a=shared[0], b=shared[1], rank_scale=parts["vera_d"], delta_scale=parts["vera_b"])
    assert_never(method)


def _build_dora(a: Tensor, b: Tensor, magnitude: Tensor, *, layer: nn.Module) -> SlotWeights:
    """Return the terms of DoRA; a: (R, H), b: (O, R) with the scale inside, magnitude: (O,).

    out_scale = magnitude / ||W + B A|| over the rows; DoRA leaves the bias alone, so out_shift takes it back.
    """
    norm = _row_norms(serving_weight(layer), a, b)
    out_scale = (magnitude.to(torch.float64) / norm).to(torch.float32)
    bias = serving_bias(layer)
    b = by_columns(b)
    return SlotWeights(a=a, b=b, out_scale=out_scale, out_shift=None if bias is None else bias * (1 - out_scale))


def _row_norms(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return ||W + B A|| per row, (O,) float64, without forming B A; weight: (O, H), a: (R, H), b: (O, R)."""
    squares, cross, own = row_terms(weight, a, b)
    return (squares + 2 * cross + own).clamp_min(0).sqrt()


def _measure(
    config: AdapterConfig, modules: Mapping[str, SlotWeights], *, base: Base, model: nn.Module, num_pruned: int
) -> EffectReport:
    has_scale = config.method not in (Method.IA3, Method.VERA)
    return measure_effect(
        config.method,
        modules,
        scales={module: config.scale_of(module) if has_scale else None for module in modules},
        model=model,
        unmatched_targets=config.unmatched_targets(base.modules),
        num_linears=len(base.modules),
        num_pruned=num_pruned,
    )


def _own_bytes(weights: SlotWeights, projections: Projections | None) -> int:
    shared = 0 if projections is None or weights.a is None or weights.b is None else weights.a.nbytes + weights.b.nbytes
    return weights.size_bytes - shared


def _check_effect(view: Path, config: AdapterConfig, modules: Mapping[str, SlotWeights]) -> None:
    if any(_has_effect(weights) for weights in modules.values()):
        return
    listed = ", ".join(list(modules)[:3]) or "every one was pruned away"
    raise AdapterLoadError(
        f"The {config.method} adapter in {view.name!r} changes nothing in its {len(modules)} modules ({listed}).",
        "Its weights are those of an untrained adapter; train it, or use the base.",
    )


def _has_effect(weights: SlotWeights) -> bool:
    """Whether some rank component is non-zero on both sides, or some scale differs from one."""
    for scale in (weights.out_scale, weights.in_scale):
        if scale is not None and bool(((scale - 1).abs() > _UNIT_TOLERANCE).any()):
            return True
    if weights.a is None or weights.b is None:
        return False
    per_rank = weights.a.abs().amax(dim=1) * weights.b.abs().amax(dim=0)
    if weights.rank_scale is not None:
        per_rank = per_rank * weights.rank_scale
    has_output = weights.delta_scale is None or bool(weights.delta_scale.any())
    return has_output and bool(per_rank.any())
