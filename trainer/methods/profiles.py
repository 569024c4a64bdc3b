"""What each adapter method needs when the recipe says nothing: rank, strength, learning rate, weight decay.

One learning rate for all would make IA3, VeRA and AdaLoRA look broken; they need rates up to 50 times those of LoRA.
PEFT's own comparison (method_comparison/MetaMathQA in https://github.com/huggingface/peft) shows 31 against 45 percent
for IA3. Knows numbers only.
"""

from __future__ import annotations

from dataclasses import dataclass

from adapterhub.errors import RecipeError
from adapterhub.recipes import Recipe
from adapterhub.records import Method

__all__ = ["PROFILES", "VERA_PROJECTION_KEY", "Profile", "fill_in"]

# All VeRA adapters share the projections drawn from this key, so that a server holds them once.
VERA_PROJECTION_KEY = 0


@dataclass(frozen=True, slots=True)
class Profile:
    """Defaults of one method. rank and alpha are None where the method has none."""

    learning_rate: float
    rank: int | None
    alpha: float | None
    weight_decay: float


# Rates: short runs (tens of steps) on the embedded base, see docs/lab.md; long runs want lower ones.
# alpha = 2 * rank: https://arxiv.org/abs/2106.09685 section 4.1 ties it to the first rank tried.
PROFILES: dict[Method, Profile] = {
    Method.LORA: Profile(learning_rate=5e-4, rank=16, alpha=32.0, weight_decay=0.0),
    Method.DORA: Profile(learning_rate=5e-4, rank=16, alpha=32.0, weight_decay=0.0),
    # The factors start at 1; weight decay would pull them to 0, which is not "no change".
    Method.IA3: Profile(learning_rate=5e-3, rank=None, alpha=None, weight_decay=0.0),
    # rank is the final mean rank; training starts with 1.5 times as many (https://arxiv.org/abs/2303.10512 section 4).
    Method.ADALORA: Profile(learning_rate=2e-3, rank=16, alpha=32.0, weight_decay=0.0),
    # One rank for the whole platform: shared projections of different ranks cannot be held together.
    Method.VERA: Profile(learning_rate=5e-3, rank=256, alpha=None, weight_decay=0.0),
}


def fill_in(recipe: Recipe) -> Recipe:
    """Return the recipe with every null of `training` replaced by the value of its method.

    Raises RecipeError for a key the method has no use for: ignoring it would be a silent lie.
    """
    profile = PROFILES[recipe.method]
    training = recipe.training
    for key in ("rank", "alpha"):
        if getattr(training, key) is not None and getattr(profile, key) is None:
            raise RecipeError(
                f"Method {str(recipe.method)!r} has no {key}, but training.{key} is {getattr(training, key)!r}.",
                f"Leave training.{key} out.",
            )
    if training.rank_stabilized and recipe.method not in (Method.LORA, Method.DORA):
        raise RecipeError(
            f"training.rank_stabilized is not known to method {str(recipe.method)!r}.", "Set it to false."
        )
    if training.dropout and recipe.method is Method.IA3:
        raise RecipeError(
            f"Method 'ia3' has no dropout, but training.dropout is {training.dropout!r}.",
            "Set `methods.ia3.dropout` to 0.",
        )
    alpha = training.alpha
    if alpha is None and profile.alpha is not None and profile.rank is not None:
        alpha = profile.alpha / profile.rank * (training.rank or profile.rank)
    changes = {
        "learning_rate": training.learning_rate or profile.learning_rate,
        "rank": training.rank or profile.rank,
        "alpha": alpha,
        "weight_decay": profile.weight_decay if training.weight_decay is None else training.weight_decay,
    }
    return recipe.model_copy(update={"training": training.model_copy(update=changes)})
