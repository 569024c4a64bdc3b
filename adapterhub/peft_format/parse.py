"""Read `adapter_config.json` strictly: every key is one we serve, one that cannot change outputs, or an error.

Knows the keys PEFT 0.21.2 writes for LoRA, IA3, AdaLoRA and VeRA. Does not know files; the caller parsed the JSON.
Source: the config classes in https://github.com/huggingface/peft (Apache-2.0), version 0.21.2.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import NoReturn, TypedDict

from adapterhub.errors import AdapterConfigError, suggest
from adapterhub.peft_format.config import MAX_RANK, AdapterConfig, key_expression, layer_expression
from adapterhub.records import Method

__all__ = ["parse_adapter_config"]

# Keys that only matter while training, or say where the adapter came from.
_DROPPED = {
    "LORA": {"lora_dropout", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core"}
    | {"qalora_group_size"},
    "IA3": {"init_ia3_weights"},
    # AdaLoRA ignores `r`, `use_rslora` and `alpha_pattern`: it divides by `init_r` (tuners/adalora/model.py).
    "ADALORA": {"lora_dropout", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core"}
    | {"qalora_group_size", "r", "use_rslora", "alpha_pattern", "init_lora_weights", "target_r", "tinit", "tfinal"}
    | {"deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"},
    "VERA": {"vera_dropout", "d_initial", "init_weights"},
}
_DROPPED_ALWAYS = {"peft_type", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}
# Keys that would change outputs in a way we do not serve; they must be off.
_OFF_LORA = {
    "fan_in_fan_out", "bias", "modules_to_save", "megatron_config", "trainable_token_indices", "velora_config",
    "alora_invocation_tokens", "use_qalora", "monteclora_config", "layer_replication", "lora_bias", "target_parameters",
    "use_bdlora", "arrow_config", "kasa_config", "ensure_weight_tying",
}  # fmt: skip
_OFF = {
    "LORA": _OFF_LORA,
    "IA3": {"fan_in_fan_out", "modules_to_save"},
    "ADALORA": _OFF_LORA | {"use_dora"},
    "VERA": {"fan_in_fan_out", "bias", "modules_to_save"},
}
_READ_LORA = {
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "lora_alpha",
}
_READ = {
    "LORA": _READ_LORA | {"r", "alpha_pattern", "use_rslora", "use_dora", "init_lora_weights"},
    "IA3": {"target_modules", "exclude_modules", "feedforward_modules"},
    "ADALORA": _READ_LORA | {"init_r"},
    "VERA": {"target_modules", "layers_to_transform", "layers_pattern", "r", "projection_prng_key", "save_projection"},
}
_CHECKED_ALWAYS = {"task_type", "auto_mapping"}
_TASK_TYPES = (None, "CAUSAL_LM")
# The others (pissa, olora, corda, loftq, lora_ga, mica) derive the start from the base and mostly subtract it there, so
# the trained tensors belong to a base that is not ours.
_INDEPENDENT_INITS = (None, True, False, "gaussian", "eva", "orthogonal")
# Matching tries at most the product of the alternatives of each group, and each repetition adds about the places of a
# name where it can stop; a million of these take well under a second.
_MAX_WAYS = 1_000_000
_WAYS_PER_REPETITION = 10
_MAX_PATTERNS = 512  # One for each linear of a 70B model; more would not fit the cache of `re`.
_MAX_PATTERN_CHARS = 4000
_ESCAPE = re.compile(r"\\.", re.DOTALL)
_CHARACTER_CLASS = re.compile(r"\[\^?\]?[^\]]*\]")
_SPECIAL_GROUP = re.compile(r"\(\?(?!:)")
_QUANTIFIER = re.compile(r"(?<!\()(?:[*+?]|\{\d*,?\d*\})[?+]?")
_REPEATED_GROUP = re.compile(r"\)(?:[*+]|\{)")


def _refuse(key: str, value: object, allowed: str, hint: str) -> NoReturn:
    shown = repr(value) if len(repr(value)) <= 120 else f"{repr(value)[:117]}..."
    raise AdapterConfigError(f"adapter_config.json sets {key!r} to {shown}; allowed: {allowed}.", hint)


def parse_adapter_config(raw: Mapping[str, object]) -> AdapterConfig:
    """Check every key of a PEFT configuration and keep what changes outputs.

    Raises AdapterConfigError naming the key and its value: for unknown keys, for features AdapterHub does not serve and
    for values out of range.
    """
    peft_type = raw.get("peft_type")
    if not isinstance(peft_type, str) or peft_type not in _READ:
        _refuse(
            "peft_type", peft_type, ", ".join(sorted(_READ)), "AdapterHub serves LoRA, DoRA, IA3, AdaLoRA and VeRA."
        )
    _check_keys(raw, peft_type)
    match peft_type:
        case "LORA":
            return _parse_lora(raw)
        case "ADALORA":
            return _parse_adalora(raw)
        case "VERA":
            return AdapterConfig(
                method=Method.VERA,
                rank=_rank(raw, "r", 256),
                projection_prng_key=_integer(raw, "projection_prng_key", 0, low=0, high=2**53),
                save_projection=_flag(raw, "save_projection", default=True),
                **_selection(raw),
            )
        case _:
            feedforward = _names(raw, "feedforward_modules")
            return AdapterConfig(method=Method.IA3, feedforward_modules=feedforward, **_selection(raw))


def _check_keys(raw: Mapping[str, object], peft_type: str) -> None:
    known = _READ[peft_type] | _DROPPED[peft_type] | _OFF[peft_type] | _DROPPED_ALWAYS | _CHECKED_ALWAYS
    for key, value in raw.items():
        if key not in known:
            near = suggest(key, known, otherwise="Remove the key if it does not change what the adapter answers.")
            raise AdapterConfigError(
                f"adapter_config.json has the key {key!r} = {value!r}, unknown for {peft_type}.", near
            )
        is_off = value == "none" if key == "bias" else not value
        if key in _OFF[peft_type] and not is_off:
            _refuse(key, value, "off", f"AdapterHub does not serve {key!r}; train the adapter without it.")
    if raw.get("task_type") not in _TASK_TYPES:
        _refuse("task_type", raw["task_type"], "CAUSAL_LM or none", "Only adapters of generating models are served.")
    mapping = raw.get("auto_mapping")
    if mapping is not None:
        library = mapping.get("parent_library") if isinstance(mapping, dict) else None
        # PEFT writes this when no task_type was given. It names a Python module to import; nothing here imports it.
        if not isinstance(library, str) or not library.startswith("transformers."):
            _refuse(
                "auto_mapping", mapping, "none, or a class of transformers", "Custom code is never run; remove the key."
            )


def _parse_lora(raw: Mapping[str, object]) -> AdapterConfig:
    init = raw.get("init_lora_weights")
    if init not in _INDEPENDENT_INITS:
        _refuse(
            "init_lora_weights", init, "true, false, gaussian, eva, orthogonal",
            "That start changes the base; save with `path_initial_model_for_weight_conversion` to get plain LoRA.",
        )  # fmt: skip
    return AdapterConfig(
        method=Method.DORA if _flag(raw, "use_dora") else Method.LORA,
        rank=_rank(raw, "r", 8),
        alpha=_alpha(raw.get("lora_alpha", 8), "lora_alpha"),
        rank_stabilized=_flag(raw, "use_rslora"),
        rank_pattern={key: _rank({key: value}, key, 0) for key, value in _patterns(raw, "rank_pattern").items()},
        alpha_pattern={key: _alpha(value, key) for key, value in _patterns(raw, "alpha_pattern").items()},
        **_selection(raw),
    )


def _parse_adalora(raw: Mapping[str, object]) -> AdapterConfig:
    init_rank = _rank(raw, "init_r", 12)
    ranks: dict[str, int] = {}
    for key, mask in _mapping(raw, "rank_pattern").items():
        if not isinstance(mask, list) or len(mask) != init_rank or any(not isinstance(bit, bool) for bit in mask):
            _refuse(f"rank_pattern[{key}]", mask, f"{init_rank} booleans", "Save the adapter again with PEFT.")
        ranks[key.removesuffix(".default").removesuffix(".lora_E")] = sum(mask)
    return AdapterConfig(
        method=Method.ADALORA,
        rank=init_rank,
        init_rank=init_rank,
        alpha=_alpha(raw.get("lora_alpha", 8), "lora_alpha"),
        rank_pattern=dict(sorted(ranks.items())),
        **_selection(raw),
    )


class _Selection(TypedDict):
    target_modules: tuple[str, ...] | str
    exclude_modules: tuple[str, ...] | str
    layers_to_transform: tuple[int, ...]
    layers_pattern: tuple[str, ...]


def _selection(raw: Mapping[str, object]) -> _Selection:
    """The keys that say which modules are changed."""
    targets = _names(raw, "target_modules")
    layers = raw.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers or []
    pattern = raw.get("layers_pattern")
    pattern = [pattern] if isinstance(pattern, str) and pattern else pattern or []
    if not targets:
        _refuse(
            "target_modules", raw.get("target_modules"), "names or a pattern", "List the modules the adapter changes."
        )
    if not isinstance(layers, list) or any(type(idx) is not int or idx < 0 for idx in layers):
        _refuse("layers_to_transform", layers, "layer numbers from 0", "Correct the list.")
    if not isinstance(pattern, list):
        _refuse("layers_pattern", pattern, "names", "Correct the list.")
    if isinstance(targets, str) and layers:
        _refuse(
            "layers_to_transform",
            layers,
            "nothing beside a `target_modules` pattern",
            "Put the layers into the pattern.",
        )
    layers_pattern = tuple(_pattern("layers_pattern", name, layer_expression) for name in pattern)
    _check_together("layers_pattern", layers_pattern)
    return {
        "target_modules": targets,
        "exclude_modules": _names(raw, "exclude_modules"),
        "layers_to_transform": tuple(sorted(set(layers))),
        "layers_pattern": layers_pattern,
    }


def _names(raw: Mapping[str, object], key: str) -> tuple[str, ...] | str:
    value = raw.get(key) or ()
    if isinstance(value, str):
        return _pattern(key, value)
    if not isinstance(value, list | tuple) or any(not isinstance(name, str) or not name for name in value):
        _refuse(key, value, "a list of names or one regular expression", "Correct the list.")
    return tuple(sorted(set(value)))


def _bare(pattern: str) -> str:
    """The pattern with a letter for each escape and each character class: what is left of its signs has a meaning."""
    return _CHARACTER_CLASS.sub("a", _ESCAPE.sub("a", pattern))


def _num_ways(pattern: str) -> int:
    """Upper estimate of the ways in which a checked pattern can match one name."""
    bare = _bare(pattern)
    ways, alternatives = _WAYS_PER_REPETITION ** len(_QUANTIFIER.findall(bare)), [1]
    for char in bare:
        if char == "(":
            alternatives.append(1)
        elif char == "|":
            alternatives[-1] += 1
        elif char == ")":
            ways *= alternatives.pop()
    return ways


def _pattern(key: str, value: object, expression: Callable[[str], str] = str) -> str:
    """Check a regular expression: it compiles, also inside `expression`, and no module name makes it run for long."""
    if not isinstance(value, str) or len(value) > _MAX_PATTERN_CHARS:
        _refuse(key, value, f"a text of at most {_MAX_PATTERN_CHARS} characters", "List module names instead.")
    if _SPECIAL_GROUP.search(_bare(value)):
        _refuse(key, value, "plain groups, (...) or (?:...)", "Write it without flags and look-around, or list names.")
    try:
        re.compile(value)
        re.compile(expression(value))
    except (re.error, OverflowError, RecursionError) as exc:
        _refuse(key, value, "a regular expression", f"It does not compile: {exc}.")
    if _REPEATED_GROUP.search(_bare(value)) or _num_ways(value) > _MAX_WAYS:
        allowed = f"no repeated group and at most {_MAX_WAYS:,} ways to match, a repetition counting as "
        hint = "Such a pattern can run for hours; list module names instead."
        _refuse(key, value, f"{allowed}{_WAYS_PER_REPETITION}", hint)
    return value


def _check_together(key: str, patterns: Collection[str]) -> None:
    """Refuse patterns that are quick one by one but too many."""
    num_patterns = len(patterns)
    if num_patterns > _MAX_PATTERNS or sum(map(_num_ways, patterns)) > _MAX_WAYS:
        raise AdapterConfigError(
            f"adapter_config.json sets {key!r} to {num_patterns} patterns; allowed: at most {_MAX_PATTERNS}, "
            f"with {_MAX_WAYS:,} ways to match together, a repetition counting as {_WAYS_PER_REPETITION}.",
            "Write fewer patterns, or plain module names.",
        )


def _mapping(raw: Mapping[str, object], key: str) -> dict[str, object]:
    value = raw.get(key) or {}
    if not isinstance(value, dict):
        _refuse(key, value, "an object", "Correct the value.")
    return value


def _patterns(raw: Mapping[str, object], key: str) -> dict[str, object]:
    result = {_pattern(key, pattern, key_expression): value for pattern, value in _mapping(raw, key).items()}
    _check_together(key, result)
    return result


def _integer(raw: Mapping[str, object], key: str, default: int, *, low: int, high: int) -> int:
    value = raw.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        _refuse(key, value, f"an integer from {low} to {high}", "Correct the value.")
    return value


def _rank(raw: Mapping[str, object], key: str, default: int) -> int:
    return _integer(raw, key, default, low=1, high=MAX_RANK)


def _alpha(value: object, key: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value <= 0:
        _refuse(key, value, "a finite number above 0", "Correct the value.")
    return float(value)


def _flag(raw: Mapping[str, object], key: str, *, default: bool = False) -> bool:
    value = raw.get(key, default)
    if not isinstance(value, bool):
        _refuse(key, value, "true or false", "Correct the value.")
    return value
