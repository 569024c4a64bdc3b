"""What an adapter configuration means: which modules it changes, with which rank and which scale.

Knows module names. Does not know tensors or JSON files; `parse.py` reads those.
Source of the matching rules: PEFT 0.21.2, `check_target_module_exists` and `get_pattern_key`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from adapterhub.records import Method

__all__ = ["MAX_RANK", "AdapterConfig", "key_expression", "layer_expression"]

# VeRA is published with ranks up to 1024 (https://arxiv.org/abs/2310.11454); twice that leaves room.
MAX_RANK = 2048
ALL_LINEAR = "all-linear"

_ADALORA_EPSILON = 1e-5  # PEFT adds it to the rank it divides by (tuners/adalora/layer.py).
_LAYER_IDX = re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")
_PEFT_TYPES = {
    Method.LORA: "LORA",
    Method.DORA: "LORA",
    Method.IA3: "IA3",
    Method.ADALORA: "ADALORA",
    Method.VERA: "VERA",
}
_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """A checked adapter configuration; built by `parse_adapter_config`.

    rank: width of the update; for AdaLoRA the rank before pruning; None for IA3.
    rank_pattern, alpha_pattern: regular expression over module names -> value, first match wins; for AdaLoRA
    `rank_pattern` maps full module names to the rank that is left after pruning.
    target_modules, exclude_modules, feedforward_modules: name suffixes, or one regular expression over the full name.
    """

    method: Method
    target_modules: tuple[str, ...] | str
    rank: int | None = None
    alpha: float | None = None
    rank_stabilized: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict[str, int])
    alpha_pattern: Mapping[str, float] = field(default_factory=dict[str, float])
    exclude_modules: tuple[str, ...] | str = ()
    layers_to_transform: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    feedforward_modules: tuple[str, ...] | str = ()
    projection_prng_key: int | None = None
    save_projection: bool = False
    init_rank: int | None = None

    def is_target(self, module: str) -> bool:
        """Whether the adapter changes the linear called `module`."""
        if self.exclude_modules and _is_named(self.exclude_modules, module):
            return False
        if self.target_modules == ALL_LINEAR:
            return True
        if not isinstance(self.target_modules, str) and module in self.target_modules:
            return True  # A full name is taken whatever its layer.
        return _is_named(self.target_modules, module) and self._is_in_layers(module)

    def unmatched_targets(self, modules: Iterable[str]) -> tuple[str, ...]:
        """Entries of `target_modules` that name none of `modules`; harmless as long as another entry names some."""
        names = list(modules)
        entries = () if isinstance(self.target_modules, str) else sorted(self.target_modules)
        return tuple(entry for entry in entries if not any(_is_named((entry,), name) for name in names))

    def _is_in_layers(self, module: str) -> bool:
        if not self.layers_to_transform:
            return True
        patterns = [re.compile(layer_expression(name)) for name in self.layers_pattern] or [_LAYER_IDX]
        found = next((match["idx"] for pattern in patterns if (match := pattern.match(module))), None)
        return found is not None and int(found) in self.layers_to_transform

    def rank_of(self, module: str) -> int:
        """Rank of the update of `module`; 0 for IA3, which has none, and for what AdaLoRA pruned away."""
        if self.rank is None:
            return 0
        if self.method is Method.ADALORA:
            return self.rank_pattern.get(module, self.rank)
        return _first_match(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """Factor on the update of `module`.

        LoRA: alpha / r (https://arxiv.org/abs/2106.09685, section 4.1); rsLoRA: alpha / sqrt(r)
        (https://arxiv.org/abs/2312.03732); AdaLoRA: alpha / (r before pruning + 1e-5), as PEFT does; IA3 and VeRA: 1.
        """
        if self.alpha is None:
            return 1.0
        if self.method is Method.ADALORA:
            return self.alpha / ((self.init_rank or 0) + _ADALORA_EPSILON)
        alpha = _first_match(self.alpha_pattern, module, self.alpha)
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)

    def is_feedforward(self, module: str) -> bool:
        """Whether IA3 scales the input of `module`, not its output. Suffixes need no dot before them, as in PEFT."""
        if isinstance(self.feedforward_modules, str):
            return re.fullmatch(self.feedforward_modules, module) is not None
        return any(module.endswith(name) for name in self.feedforward_modules)

    def canonical(self) -> dict[str, Any]:
        """JSON-ready form of what changes outputs and nothing else; equal adapters give equal dictionaries.

        The tensors beside it fix which modules are changed and, for AdaLoRA, the ranks that pruning left.
        """
        return {
            "method": str(self.method),
            "target_modules": _plain(self.target_modules),
            "rank": self.rank,
            "alpha": self.alpha,
            "rank_stabilized": self.rank_stabilized,
            "rank_pattern": [] if self.method is Method.ADALORA else [list(item) for item in self.rank_pattern.items()],
            "alpha_pattern": [list(item) for item in self.alpha_pattern.items()],
            "exclude_modules": _plain(self.exclude_modules),
            "layers_to_transform": sorted(self.layers_to_transform),
            "layers_pattern": list(self.layers_pattern),
            "feedforward_modules": _plain(self.feedforward_modules),
            "projection_prng_key": None if self.save_projection else self.projection_prng_key,
        }

    def to_peft(self) -> dict[str, Any]:
        """The `adapter_config.json` PEFT opens: normalised, ready for inference, naming no base, path or class."""
        result: dict[str, Any] = {
            "peft_type": _PEFT_TYPES[self.method],
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": None,
            "inference_mode": True,
            "target_modules": _plain(self.target_modules),
        }
        if self.exclude_modules:
            result["exclude_modules"] = _plain(self.exclude_modules)
        if self.layers_to_transform:
            result["layers_to_transform"] = sorted(self.layers_to_transform)
        if self.layers_pattern:
            result["layers_pattern"] = list(self.layers_pattern)
        return result | self._to_peft_method()

    def _to_peft_method(self) -> dict[str, Any]:
        if self.method is Method.IA3:
            return {"feedforward_modules": _plain(self.feedforward_modules)}
        if self.method is Method.VERA:
            key, is_saved = self.projection_prng_key, self.save_projection
            return {"r": self.rank, "projection_prng_key": key, "save_projection": is_saved}
        if self.method is Method.ADALORA:
            init_rank = self.init_rank or 0
            masks = {
                f"{module}.lora_E": [row < rank for row in range(init_rank)]  # which rows were kept is no longer seen
                for module, rank in self.rank_pattern.items()
            }
            # PEFT refuses AdaLoRA without a schedule; this one is never run.
            return {"init_r": init_rank, "lora_alpha": self.alpha, "rank_pattern": masks or None, "total_step": 1}
        return {
            "r": self.rank,
            "lora_alpha": self.alpha,
            "use_rslora": self.rank_stabilized,
            "use_dora": self.method is Method.DORA,
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
        }


def key_expression(pattern: str) -> str:
    """The regular expression that a key of `rank_pattern` or `alpha_pattern` stands for."""
    return rf"(.*\.)?({pattern})$"


def layer_expression(pattern: str) -> str:
    """The regular expression that an entry of `layers_pattern` stands for; its group `idx` is the layer."""
    return rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\."


def _plain(names: tuple[str, ...] | str) -> list[str] | str:
    return names if isinstance(names, str) else sorted(names)


def _is_named(names: Iterable[str] | str, module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _first_match(patterns: Mapping[str, _Number], module: str, default: _Number) -> _Number:
    for pattern, value in patterns.items():
        if re.match(key_expression(pattern), module):
            return value
    return default
