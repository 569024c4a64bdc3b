"""Greedy answers for measuring: left-padded batches, longest prompts first, finished rows leave the batch.

Base and adapter go through the same function, so a difference between them is not one of decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase

from adapterhub.base.prompts import stop_token_ids
from adapterhub.recipes import Generation
from trainer.data.batches import pad_token

__all__ = ["Answers", "generate_answers"]


@dataclass(frozen=True, slots=True)
class Answers:
    """One text per prompt. num_unfinished: how many ran into the limit of new tokens before any stop."""

    texts: tuple[str, ...]
    num_unfinished: int = 0


def generate_answers(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    generation: Generation,
    on_rows: Callable[[int, int], None] | None = None,
) -> Answers:
    """Return the answer to each prompt, in order. on_rows(done, total) is called after each batch."""
    stops = stop_token_ids(tokenizer)
    order = sorted(range(len(prompts)), key=lambda idx: (-len(prompts[idx]), idx))
    answers = [""] * len(prompts)
    num_unfinished = 0
    for start in range(0, len(order), generation.batch_size):
        part = order[start : start + generation.batch_size]
        tokens = _greedy_batch(
            model,
            [prompts[idx] for idx in part],
            stops=stops,
            max_new_tokens=generation.max_new_tokens,
            pad_token_id=pad_token(tokenizer),
        )
        for idx, ids in zip(part, tokens, strict=True):
            text = str(tokenizer.decode(ids, skip_special_tokens=True))
            answers[idx] = _cut(text, generation.stop)
            has_stop = len(ids) < generation.max_new_tokens or any(stop in text for stop in generation.stop)
            num_unfinished += not has_stop
        if on_rows is not None:
            on_rows(start + len(part), len(order))
    return Answers(tuple(answers), num_unfinished)


def _cut(text: str, stops: Sequence[str]) -> str:
    ends = [text.index(stop) for stop in stops if stop in text]
    return text[: min(ends, default=len(text))].strip()


@torch.inference_mode()
def _greedy_batch(
    model: Any, prompts: Sequence[Sequence[int]], *, stops: Collection[int], max_new_tokens: int, pad_token_id: int
) -> list[list[int]]:
    """Decode B prompts until a stop token or the limit; stop tokens are not part of the result."""
    input_ids, mask = _pad_left(prompts, pad_token_id, model.device)
    cache = DynamicCache(config=model.config)
    rows = list(range(len(prompts)))  # Row of the batch -> prompt.
    answers: list[list[int]] = [[] for _ in prompts]
    for _ in range(max_new_tokens):
        positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -input_ids.shape[1] :]
        logits = model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        chosen: list[int] = logits.argmax(-1).tolist()  # Waits for the device.
        alive = [idx for idx, token in enumerate(chosen) if token not in stops]
        for idx in alive:
            answers[rows[idx]].append(chosen[idx])
        if not alive:
            break
        if len(alive) < len(rows):
            keep = torch.tensor(alive, device=mask.device)
            cache.batch_select_indices(keep)
            mask = mask[keep]
            rows = [rows[idx] for idx in alive]
        input_ids = torch.tensor([[chosen[idx]] for idx in alive], device=mask.device)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return answers


def _pad_left(prompts: Sequence[Sequence[int]], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (input_ids, attention_mask), both (B, T) int64, with the gaps on the left."""
    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), width), pad_token_id)
    mask = torch.zeros((len(prompts), width), dtype=torch.int64)
    for idx, prompt in enumerate(prompts):
        input_ids[idx, width - len(prompt) :] = torch.tensor(prompt)
        mask[idx, width - len(prompt) :] = 1
    return input_ids.to(device), mask.to(device)
