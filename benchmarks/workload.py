"""Real prompts for every system: held-out rows of two shipped recipes, as token ids in the base's chat format."""

from __future__ import annotations

from itertools import chain

from adapterhub.base.identity import Base
from adapterhub.base.loading import load_tokenizer
from adapterhub.errors import UserInputError
from adapterhub.recipes import load_recipe
from adapterhub.settings import Settings
from trainer.run import prepare_data

__all__ = ["load_prompts"]

_TASKS = ("summarize", "ask")
_SHORTEST, _LONGEST = 100, 160  # Prompt tokens: the recipes' own lengths without their tails.


def load_prompts(base: Base, settings: Settings, *, num_prompts: int) -> list[tuple[int, ...]]:
    """Return prompts of the two tasks in turn, always the same ones. Raises UserInputError when there are too few."""
    tokenizer = load_tokenizer(base)
    by_task = [
        [
            row.prompt_ids
            for row in prepare_data(load_recipe(task, settings), settings=settings, tokenizer=tokenizer).held_out
            if _SHORTEST <= len(row.prompt_ids) <= _LONGEST
        ]
        for task in _TASKS
    ]
    prompts = list(chain.from_iterable(zip(*by_task, strict=False)))
    if len(prompts) < num_prompts:
        raise UserInputError(
            f"{num_prompts} prompts are wanted, but {' and '.join(_TASKS)} hold out only {len(prompts)} that fit.",
            "Ask for fewer requests or adapters.",
        )
    return prompts[:num_prompts]
