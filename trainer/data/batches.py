"""Which rows form the batch of each step, and how they become tensors.

Rows of similar length share a batch, because padding is arithmetic for nothing. The whole plan is fixed before the
first step, so it depends on lengths and seed only.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler

from trainer.data.tokens import IGNORED

__all__ = ["PlannedSampler", "collate", "pad_token", "plan_batches"]

_BATCHES_PER_BUCKET = 8  # Rows are sorted within 8 batches: most of the padding goes, most of the shuffling stays.


def plan_batches(lengths: Sequence[int], *, batch_size: int, num_steps: int, seed: int) -> list[list[int]]:
    """Return `num_steps` lists of row indices; each row comes once before any comes twice."""
    rng = random.Random(seed)
    order = _endless(len(lengths), rng)
    batches: list[list[int]] = []
    while len(batches) < num_steps:
        bucket = [next(order) for _ in range(batch_size * min(_BATCHES_PER_BUCKET, num_steps - len(batches)))]
        bucket.sort(key=lambda idx: lengths[idx])
        cut = [bucket[start : start + batch_size] for start in range(0, len(bucket), batch_size)]
        rng.shuffle(cut)
        batches += cut
    return batches


def _endless(num_rows: int, rng: random.Random) -> Iterator[int]:
    while True:
        yield from rng.sample(range(num_rows), num_rows)


class PlannedSampler(Sampler[int]):
    """Yield the indices of planned batches one after the other; the loader cuts them into the same batches again."""

    def __init__(self, batches: Sequence[Sequence[int]]) -> None:
        self._indices = [idx for batch in batches for idx in batch]

    def __iter__(self) -> Iterator[int]:
        return iter(self._indices)

    def __len__(self) -> int:
        return len(self._indices)


def pad_token(tokenizer: Any) -> int:
    """Id to fill gaps with; any token does, because masks and labels follow lengths."""
    return int(tokenizer.pad_token_id) if tokenizer.pad_token_id is not None else 0


def collate(rows: Sequence[dict[str, list[int]]], *, pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad rows on the right to the longest of them.

    Returns input_ids, attention_mask and labels, each (B, T) int64. The mask follows the lengths, never the pad token,
    which may be the stop token that a row must learn.
    """
    width = max(len(row["input_ids"]) for row in rows)
    shape = (len(rows), width)
    input_ids = torch.full(shape, pad_token_id)
    labels = torch.full(shape, IGNORED)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    for idx, row in enumerate(rows):
        length = len(row["input_ids"])
        input_ids[idx, :length] = torch.tensor(row["input_ids"])
        labels[idx, :length] = torch.tensor(row["labels"])
        attention_mask[idx, :length] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
