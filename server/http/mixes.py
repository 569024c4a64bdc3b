"""`{"mix": {"summarize": 0.7, "ask@v2": -0.3}}`: what a mix may be, checked before anything is loaded.

Names of one adapter add up, so that a mix of two aliases goes on working when both point to the same version. Knows
versions and weights; how a sum is computed is the engine's business.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import JsonValue

from adapterhub.errors import RequestError, UnsupportedFieldError
from adapterhub.records import Manifest
from adapterhub.store import Version
from server.engine.types import MAX_STACKED_RANK

__all__ = ["MAX_MEMBERS", "MAX_WEIGHT", "MIN_WEIGHT", "Member", "check_ranks", "merge_members", "read_weights"]

MAX_MEMBERS = 8  # As many as a gate weighs in X-LoRA (https://arxiv.org/abs/2402.07148); each costs a full adapter.
MIN_WEIGHT = 1e-4  # Less would disappear in the rounding of what the other members add.
MAX_WEIGHT = 8.0  # Task arithmetic (https://arxiv.org/abs/2212.04089) finds its best weights below 2.
_RANGE = f"from {-MAX_WEIGHT:g} to {MAX_WEIGHT:g} whose size is at least {MIN_WEIGHT:g}"
_PARAM = "adapter.mix"
_SHAPE = 'Send {"mix": {name: weight, ...}}'
_RANK_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.(lora_A(\.weight)?|vera_lambda_d)")


@dataclass(frozen=True, slots=True)
class Member:
    """One adapter of a mix and the sum of the weights it was given."""

    version: Version
    weight: float


def read_weights(mix: JsonValue) -> dict[str, float]:
    """Return the weight of each name as sent. Raises RequestError naming the value and what is allowed."""
    if not isinstance(mix, dict):
        raise _refusal(f"The mix is {mix!r}, not an object.", f"{_SHAPE} with 1 to {MAX_MEMBERS} names.")
    if not 1 <= len(mix) <= MAX_MEMBERS:
        raise _refusal(f"The mix names {len(mix)} adapters.", f"{_SHAPE} with 1 to {MAX_MEMBERS} names.")
    return {name: _read_weight(name, weight) for name, weight in mix.items()}


def _read_weight(name: str, weight: JsonValue) -> float:
    if name == "base":
        raise _refusal("The mix gives 'base' a weight.", "Leave it out: the base always takes part, with weight 1.")
    if isinstance(weight, int | float) and not isinstance(weight, bool) and _is_weight(weight):
        return float(weight)
    raise _refusal(f"In the mix, {name!r} has the weight {weight!r}.", f"Give a number {_RANGE}.")


def _is_weight(number: float) -> bool:
    return MIN_WEIGHT <= abs(number) <= MAX_WEIGHT  # NaN fails, and no integer in that range overflows.


def merge_members(named: Sequence[tuple[str, Version, float]]) -> list[Member]:
    """Add up the weights of names that mean one adapter. Raises RequestError for what has no defined sum."""
    weights: dict[str, list[float]] = {}
    versions: dict[str, Version] = {}
    names: dict[str, list[str]] = {}
    for name, version, weight in named:
        digest = version.serving_digest
        versions.setdefault(digest, version)
        names.setdefault(digest, []).append(name)
        weights.setdefault(digest, []).append(weight)
    members = [Member(versions[digest], math.fsum(given)) for digest, given in weights.items()]
    for member in members:
        if not _is_weight(member.weight):
            listed = ", ".join(repr(name) for name in names[member.version.serving_digest])
            raise _refusal(
                f"In the mix, {listed} are all {member.version.label!r}; their weights add up to {member.weight:g}.",
                f"Let them add up to a number {_RANGE}.",
            )
    if len(members) > 1 or members[0].weight != 1:
        _check_additive(members)
    return members


def _check_additive(members: Sequence[Member]) -> None:
    for member in members:
        method, label = member.version.method, member.version.label
        if not method.is_additive:
            raise UnsupportedFieldError(
                f"In the mix, {label!r} is of method {method!s}: it scales what the base computes, so no weighted sum "
                "with it is defined.",
                f'Send "adapter": "{label}" to use it alone, or mix adapters of lora, adalora and vera.',
            ).at(_PARAM)


def check_ranks(manifests: Sequence[Manifest]) -> None:
    """Refuse a mix that stacks more ranks in one module than the engine serves. Raises RequestError."""
    ranks: Counter[str] = Counter()
    for manifest in manifests:
        for tensor in manifest.tensors:
            if found := _RANK_TENSOR.fullmatch(tensor.name):
                ranks[found["module"]] += tensor.shape[0]
    module, rank = max(ranks.items(), key=lambda item: item[1])
    if rank > MAX_STACKED_RANK:
        raise _refusal(
            f"The members of the mix have rank {rank} together in {module!r}; the limit is {MAX_STACKED_RANK}.",
            "Mix fewer adapters, or adapters of lower rank.",
        )


def _refusal(what: str, hint: str) -> RequestError:
    return RequestError(what, hint).at(_PARAM)
