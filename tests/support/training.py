"""Tiny training jobs: rows a random model can learn in a few steps, and the recipe for them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from adapterhub.base.prompts import text_token_ids
from adapterhub.recipes import DataSource, Recipe, parse_method
from trainer.data.tokens import TokenRow, answer_stop_token
from trainer.methods.profiles import fill_in

__all__ = ["echo_rows", "tiny_recipe", "write_jsonl", "write_task"]

_ANSWER = "ok ok"


def write_jsonl(path: Path, rows: Iterable[object]) -> Path:
    """Write each row as one line; text rows are written as they stand, so that they may be malformed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_task(path: Path, *, num_rows: int = 40) -> Path:
    """Rows with different prompts and one answer: the easiest thing to learn, and nothing a random model says."""
    return write_jsonl(path, ({"prompt": f"row {idx}", "completion": _ANSWER} for idx in range(num_rows)))


def echo_rows(tokenizer: PreTrainedTokenizerBase, *, num_rows: int = 64, seed: int = 0) -> list[TokenRow]:
    """Rows whose answer is the prompt reversed, of mixed lengths."""
    rng = random.Random(seed)
    stop = answer_stop_token(tokenizer)
    words = ["".join(rng.choice("abcd") for _ in range(rng.randint(4, 10))) for _ in range(num_rows)]
    return [
        TokenRow(
            line=idx,
            messages=({"role": "user", "content": word},),
            target=word[::-1],
            group=None,
            prompt_ids=tuple(text_token_ids(tokenizer, f"{word}=")),
            answer_ids=(*text_token_ids(tokenizer, word[::-1]), stop),
        )
        for idx, word in enumerate(words)
    ]


def tiny_recipe(method: str = "lora", *, data: Path = Path("unused.jsonl"), **changes: Any) -> Recipe:
    """A resolved recipe for a tiny base; `changes` are dotted keys with `__` for the dot, such as training__rank=3."""
    recipe = Recipe(task="tiny", data=DataSource(file=data), method=parse_method(method))
    defaults = {"training.max_steps": 30, "generation.max_new_tokens": 8, "split.eval": 20, "gate.num_rows": 20}
    given = {key.replace("__", "."): value for key, value in changes.items()}
    texts = {key: json.dumps(value) for key, value in (defaults | given).items()}
    return fill_in(recipe.resolve(changes=texts))
