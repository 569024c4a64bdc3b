"""Greedy decoding through a Runner, with rows that join at any step, and what each row must equal."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from server.engine.runner import Runner, StepRow

__all__ = ["Row", "decode", "expected_logits", "prompt"]


@dataclass
class Row:
    """One sequence. joins_at: step of its first token; pieces: how many steps its prompt is spread over."""

    token_ids: list[int]
    slot: int = -1
    joins_at: int = 0
    pieces: int = 1
    num_done: int = 0
    logits: list[Tensor] = field(default_factory=list)  # One (V,) per generated token.


def prompt(num_tokens: int, seed: int) -> list[int]:
    """Random bytes, which the tiny bases and the real one all have among their tokens."""
    return [random.Random(seed * 1000 + idx).randrange(3, 250) for idx in range(num_tokens)]


def _next(row: Row) -> list[int]:
    waiting = row.token_ids[row.num_done :]
    if row.logits or row.pieces <= 1:
        return waiting
    row.pieces -= 1
    return waiting[: max(1, len(waiting) // 2)]


def decode(runner: Runner, rows: Sequence[Row], *, num_steps: int, seed: int = 0) -> None:
    """Run steps with the rows in shuffled order; each row grows greedily. Blocks are handed out in shuffled order."""
    shuffle = random.Random(seed).shuffle
    blocks = list(range(runner.num_blocks))
    shuffle(blocks)
    size = runner.num_blocks // len(rows)
    owned = {id(row): tuple(blocks[idx * size : (idx + 1) * size]) for idx, row in enumerate(rows)}
    for step in range(num_steps):
        active = [row for row in rows if row.joins_at <= step]
        shuffle(active)
        pieces = [_next(row) for row in active]
        planned = [
            StepRow(tuple(piece), row.num_done, owned[id(row)], row.slot)
            for row, piece in zip(active, pieces, strict=True)
        ]
        logits = runner.step(planned, epoch=runner.epoch)
        for row, piece, found in zip(active, pieces, logits, strict=True):
            row.num_done += len(piece)
            if row.num_done == len(row.token_ids):
                row.logits.append(found)
                row.token_ids.append(int(found.argmax()))


def expected_logits(model: torch.nn.Module, row: Row) -> Tensor:
    """What `model` alone says at each position where `row` generated a token, (generated tokens, V)."""
    num_new = len(row.logits)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row.token_ids[:-1]])).logits[0]
    return logits[-num_new:].float()
