"""Build the PEFT configuration of a recipe's method, with nothing left to a library default that changes results.

Knows PEFT and the module names of the base; loads no weights. PEFT's `target_modules=None` would mean query and value
only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar, assert_never

from adapterhub.base import Base
from adapterhub.errors import RecipeError, suggest
from adapterhub.recipes import Recipe
from adapterhub.records import Method
from trainer.methods.profiles import VERA_PROJECTION_KEY
from trainer.notices import library_notices_ignored

if TYPE_CHECKING:
    from peft import PeftConfig

_T = TypeVar("_T")

__all__ = ["adalora_schedule", "build_peft_config", "target_leaves"]

# Output projections of the feed-forward blocks: IA3 scales their input (https://arxiv.org/abs/2205.05638, section 3.3).
_FEEDFORWARD_LEAVES = frozenset({"down_proj", "fc2", "w2", "c_proj", "dense_4h_to_h", "fc_out"})
_ADALORA_START = 1.5  # Initial over final rank, https://arxiv.org/abs/2303.10512 section 4.
_ADALORA_WARMUP = 0.1  # Share of the steps with all ranks: importance needs some gradients first.
_ADALORA_FINAL = 0.4  # Share of the steps after the last cut, to train what is left.
# Weight of the orthogonality term: PEFT's default; the authors' runs of thousands of steps use 0.1.
_ADALORA_ORTHOGONALITY = 0.5
# Both smoothing factors of importance, as in the authors' runs (README of https://github.com/QingruZhang/AdaLoRA, NLU).
_ADALORA_SMOOTHING = 0.85
_ADALORA_CUT_INTERVAL = 1  # Steps between two cuts; runs of tens of steps have none to lose.
_ADALORA_MIN_STEPS = 5  # One step of each phase, and room to cut.


def target_leaves(recipe: Recipe, base: Base) -> list[str]:
    """Return the sorted last name parts of the modules to adapt. Raises RecipeError for one the base lacks."""
    known = sorted({name.rpartition(".")[2] for name in base.modules})
    wanted = recipe.training.target_modules
    if wanted == "all-linear":
        return known
    for name in wanted:
        if not any(module == name or module.endswith(f".{name}") for module in base.modules):
            hint = suggest(name, known, otherwise=f"It has: {', '.join(known)}.")
            raise RecipeError(f"training.target_modules names {name!r}, which base {base.name!r} lacks.", hint)
    return sorted(set(wanted))


def adalora_schedule(num_steps: int) -> tuple[int, int]:
    """Return (tinit, tfinal) in steps. Raises RecipeError when the run is too short to cut ranks."""
    if num_steps < _ADALORA_MIN_STEPS:
        raise RecipeError(
            f"AdaLoRA cannot cut ranks within training.max_steps = {num_steps}.",
            f"Use at least {_ADALORA_MIN_STEPS} steps or another method.",
        )
    return max(1, round(_ADALORA_WARMUP * num_steps)), max(1, round(_ADALORA_FINAL * num_steps))


def build_peft_config(recipe: Recipe, base: Base) -> PeftConfig:
    """Return the PEFT configuration of a recipe whose nulls are filled in (see `profiles.fill_in`)."""
    from peft import AdaLoraConfig, IA3Config, LoraConfig, VeraConfig

    training = recipe.training
    leaves = target_leaves(recipe, base)
    common: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": leaves}
    match recipe.method:
        case Method.LORA | Method.DORA:
            return LoraConfig(
                r=_given(training.rank),
                lora_alpha=_whole(_given(training.alpha)),
                lora_dropout=training.dropout,
                use_rslora=training.rank_stabilized,
                use_dora=recipe.method is Method.DORA,
                **common,
            )
        case Method.IA3:
            return IA3Config(feedforward_modules=_feedforward(leaves), **common)
        case Method.ADALORA:
            tinit, tfinal = adalora_schedule(training.max_steps)
            return AdaLoraConfig(
                init_r=math.ceil(_ADALORA_START * _given(training.rank)),
                target_r=_given(training.rank),
                lora_alpha=_whole(_given(training.alpha)),
                lora_dropout=training.dropout,
                total_step=training.max_steps,
                tinit=tinit,
                tfinal=tfinal,
                deltaT=_ADALORA_CUT_INTERVAL,
                beta1=_ADALORA_SMOOTHING,
                beta2=_ADALORA_SMOOTHING,
                orth_reg_weight=_ADALORA_ORTHOGONALITY,
                **common,
            )
        case Method.VERA:
            with library_notices_ignored():  # It praises save_projection, which makes the file 22 times as large.
                return VeraConfig(
                    r=_given(training.rank),
                    vera_dropout=training.dropout,
                    projection_prng_key=VERA_PROJECTION_KEY,
                    save_projection=False,
                    **common,
                )
    assert_never(recipe.method)


def _given(value: _T | None) -> _T:
    assert value is not None, "profiles.fill_in comes first"
    return value


def _whole(alpha: float) -> Any:
    """PEFT writes alpha into JSON as it gets it; whole numbers stay whole, as other tools expect."""
    return int(alpha) if alpha == int(alpha) else alpha


def _feedforward(leaves: Iterable[str]) -> list[str]:
    return [leaf for leaf in leaves if leaf.rpartition(".")[2] in _FEEDFORWARD_LEAVES]
