"""Which tensor of an adapter file belongs to which module of the base, and whether every shape fits.

Knows names and shapes. Does not know values; `adapterhub.store.weights` and the server's loader look at those.
Source of the names: what PEFT 0.21.2 writes with `save_pretrained`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from adapterhub.errors import AdapterMismatchError, suggest
from adapterhub.peft_format.config import AdapterConfig
from adapterhub.records import Method

__all__ = ["SHARED_VERA_A", "SHARED_VERA_B", "ModuleTensors", "TensorInfo", "map_tensors"]

SHARED_VERA_A = "base_model.vera_A"
SHARED_VERA_B = "base_model.vera_B"

_PREFIX = "base_model.model."
_LORA_ROLES = {"lora_A.weight": "a", "lora_B.weight": "b"}
_ROLES: dict[Method, dict[str, str]] = {
    Method.LORA: _LORA_ROLES,
    Method.DORA: {**_LORA_ROLES, "lora_magnitude_vector": "magnitude", "lora_magnitude_vector.weight": "magnitude"},
    Method.IA3: {"ia3_l": "ia3"},
    Method.ADALORA: {"lora_A": "a", "lora_B": "b", "lora_E": "e", "ranknum": "ranknum"},
    Method.VERA: {"vera_lambda_d": "vera_d", "vera_lambda_b": "vera_b"},
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Type and shape of one tensor, as the file's header states them."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ModuleTensors:
    """Names of the tensors of one module; None where the method has none.

    Shapes with R rank, H input and O output width: a (R, H); b (O, R); magnitude (O,); e (R, 1); vera_d (R,);
    vera_b (O,); ia3 (O, 1), or (1, H) for a feed-forward module.
    """

    a: str | None = None
    b: str | None = None
    magnitude: str | None = None
    e: str | None = None
    vera_d: str | None = None
    vera_b: str | None = None
    ia3: str | None = None


def map_tensors(
    config: AdapterConfig, tensors: Mapping[str, TensorInfo], modules: Mapping[str, tuple[int, int]]
) -> dict[str, ModuleTensors]:
    """Assign every tensor to a module of the base; the result is sorted by module name.

    modules: module name -> (out_features, in_features) of every linear of the base.
    Raises AdapterMismatchError when a tensor has no module, a module has no tensor, or a shape does not fit: an adapter
    that fits only in part would answer, wrongly.
    """
    found, strays = _assign(config, tensors, modules)
    if strays:
        name = strays[0]
        raise AdapterMismatchError(
            f"{len(strays)} of {len(tensors)} tensors belong to no module of this base that the configuration targets; "
            f"the first is {name!r}.",
            suggest(
                _module_of(name), list(modules), otherwise="Name the base the adapter was trained on with `--base`."
            ),
        )
    if not found:
        raise AdapterMismatchError(
            f"The adapter file holds no {config.method} tensor.", "Save the adapter with PEFT's `save_pretrained`."
        )
    _check_complete(config, found, modules)
    for module, roles in found.items():
        _check_shapes(config, module, roles, tensors=tensors, size=modules[module])
    if config.method is Method.VERA:
        _check_projections(config, tensors, [modules[module] for module in found])
    return {
        module: ModuleTensors(**{role: name for role, name in found[module].items() if role != "ranknum"})
        for module in sorted(found)
    }


def _module_of(name: str) -> str:
    return name.removeprefix(_PREFIX).rsplit(".lora_", 1)[0].rsplit(".ia3_", 1)[0].rsplit(".vera_", 1)[0]


def _assign(
    config: AdapterConfig, tensors: Mapping[str, TensorInfo], modules: Mapping[str, tuple[int, int]]
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Return {module: {role: tensor name}} and the names that belong nowhere."""
    roles = _ROLES[config.method]
    found: dict[str, dict[str, str]] = {}
    strays: list[str] = []
    for name in sorted(tensors):
        if config.method is Method.VERA and name in (SHARED_VERA_A, SHARED_VERA_B):
            continue
        suffix = next((suffix for suffix in roles if name.endswith(f".{suffix}")), None)
        module = name.removeprefix(_PREFIX).removesuffix(f".{suffix}")
        is_known = suffix is not None and name.startswith(_PREFIX) and module in modules and config.is_target(module)
        if suffix is None or not is_known or roles[suffix] in found.get(module, {}):
            strays.append(name)
        else:
            found.setdefault(module, {})[roles[suffix]] = name
    return found, strays


def _check_complete(
    config: AdapterConfig, found: Mapping[str, Mapping[str, str]], modules: Mapping[str, tuple[int, int]]
) -> None:
    required = {role: suffix for suffix, role in reversed(_ROLES[config.method].items()) if role != "ranknum"}
    for module, roles in found.items():
        missing = sorted(suffix for role, suffix in required.items() if role not in roles)
        if missing:
            raise AdapterMismatchError(
                f"Module {module!r} has {', '.join(sorted(roles.values()))} but lacks {', '.join(missing)}.",
                "The adapter file is incomplete; save it again.",
            )
    empty = sorted(module for module in modules if module not in found and config.is_target(module))
    if empty:
        raise AdapterMismatchError(
            f"{len(empty)} modules that the configuration targets have no tensor; the first is {empty[0]!r}.",
            "Correct `target_modules`, or name the base the adapter was trained on with `--base`.",
        )


def _check_shapes(
    config: AdapterConfig,
    module: str,
    roles: Mapping[str, str],
    *,
    tensors: Mapping[str, TensorInfo],
    size: tuple[int, int],
) -> None:
    num_out, num_in = size
    rank = config.rank_of(module)
    expected: dict[str, tuple[int, ...]] = {
        "a": (rank, num_in),
        "b": (num_out, rank),
        "magnitude": (num_out,),
        "e": (rank, 1),
        "vera_d": (rank,),
        "vera_b": (num_out,),
        "ia3": (1, num_in) if config.is_feedforward(module) else (num_out, 1),
    }
    for role, name in roles.items():
        if role == "ranknum" or tensors[name].shape == expected[role]:
            continue
        what = f"rank {rank}" if rank else str(config.method)
        raise AdapterMismatchError(
            f"Tensor {name!r} has the shape {tensors[name].shape}; {what} on a module with {num_out} outputs and "
            f"{num_in} inputs needs {expected[role]}.",
            "Its configuration was edited, or it was trained on another base: name that with `--base`.",
        )


def _check_projections(config: AdapterConfig, tensors: Mapping[str, TensorInfo], sizes: list[tuple[int, int]]) -> None:
    """Compare the shared VeRA projections with the widest targeted module. Not saved means drawn again from the key."""
    present = [name for name in (SHARED_VERA_A, SHARED_VERA_B) if name in tensors]
    expected_names = [SHARED_VERA_A, SHARED_VERA_B] if config.save_projection else []
    if present != expected_names:
        raise AdapterMismatchError(
            f"`save_projection` is {config.save_projection} but the file holds {present or 'no shared projection'}.",
            "Save the adapter again with `save_projection=True`.",
        )
    widest_out, widest_in = max(num_out for num_out, _ in sizes), max(num_in for _, num_in in sizes)
    rank = config.rank or 0
    for name, shape in ((SHARED_VERA_A, (rank, widest_in)), (SHARED_VERA_B, (widest_out, rank))):
        if name in tensors and tensors[name].shape != shape:
            raise AdapterMismatchError(
                f"The shared {name!r} has the shape {tensors[name].shape}; the targeted modules need {shape}.",
                "Name the base the adapter was trained on with `--base`.",
            )
