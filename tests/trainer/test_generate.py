from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adapterhub.base.loading import load_model, load_tokenizer
from adapterhub.recipes import Generation
from tests.support.tiny_models import build_base
from tests.support.training import echo_rows
from trainer.generate import generate_answers


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_batched_answers_equal_those_of_transformers_one_prompt_at_a_time(tmp_path: Path, family: str) -> None:
    base = build_base(tmp_path / "base", family)
    tokenizer, model = load_tokenizer(base), load_model(base)
    prompts = [row.prompt_ids for row in echo_rows(tokenizer, num_rows=11)]
    seen: list[tuple[int, int]] = []
    answers = generate_answers(
        model,
        prompts,
        tokenizer=tokenizer,
        generation=Generation(max_new_tokens=12, batch_size=4),
        on_rows=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(4, 11), (8, 11), (11, 11)]
    for prompt, answer in zip(prompts, answers.texts, strict=True):
        ids: Any = model.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, attention_mask=torch.ones(1, len(prompt))
        )
        assert answer == str(tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True)).strip()


def test_rows_that_stop_leave_the_batch_and_the_others_go_on(tmp_path: Path) -> None:
    base = build_base(tmp_path / "base")
    tokenizer, model = load_tokenizer(base), load_model(base)
    prompts = [row.prompt_ids for row in echo_rows(tokenizer, num_rows=8)]
    options: dict[str, Any] = {"tokenizer": tokenizer, "generation": Generation(max_new_tokens=12)}
    free = generate_answers(model, prompts, **options)
    letter = next(char for char in "".join(free.texts) if char.isascii() and char.isalpha())
    tokenizer.eos_token = letter  # Some rows now stop early, at different steps.
    stopped = generate_answers(model, prompts, **options)
    assert tuple(answer.partition(letter)[0].strip() for answer in free.texts) == stopped.texts
    assert free.texts != stopped.texts
    assert free.num_unfinished == 8
    assert stopped.num_unfinished == sum(letter not in answer for answer in free.texts) < 8


def test_a_stop_text_cuts_the_answer_and_finishes_it(tmp_path: Path) -> None:
    base = build_base(tmp_path / "base")
    tokenizer, model = load_tokenizer(base), load_model(base)
    (row,) = echo_rows(tokenizer, num_rows=1)
    options: dict[str, Any] = {"tokenizer": tokenizer}
    free = generate_answers(model, [row.prompt_ids], generation=Generation(max_new_tokens=12), **options)
    stop = free.texts[0][3:5]
    cut = generate_answers(model, [row.prompt_ids], generation=Generation(max_new_tokens=12, stop=(stop,)), **options)
    assert cut.texts == (free.texts[0][: free.texts[0].index(stop)].strip(),)
    assert (free.num_unfinished, cut.num_unfinished) == (1, 0)
