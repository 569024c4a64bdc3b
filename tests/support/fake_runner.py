"""A runner without a model. It reads each row's history back through its blocks, so wrong blocks give wrong answers."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from server.engine.runner import StepRow
from tests.support.tiny_models import VOCAB_SIZE

__all__ = ["FakeRunner", "expected_token"]


def expected_token(history: Sequence[int], adapter: str) -> int:
    """Return the token that follows `history` with the adapter of that name ("" for the base)."""
    return (sum(token * (idx + 1) for idx, token in enumerate(history)) * 31 + sum(adapter.encode())) % 256


class FakeRunner:
    """Deterministic next tokens from the whole history and the adapter; counts steps and checks every promise.

    The adapter of a view is the name of its folder. broken_*: names that fail; poisoned: names whose logits are NaN;
    gate: steps wait while it is cleared.
    """

    def __init__(self, *, num_slots: int = 4, num_blocks: int = 64, block_size: int = 4, step_s: float = 0.0) -> None:
        self.num_slots, self.num_blocks, self.block_size = num_slots, num_blocks, block_size
        self.vocab_size = VOCAB_SIZE
        self.epoch = 0
        self.step_s = step_s
        self.gate = threading.Event()
        self.gate.set()
        self.broken_loads: set[str] = set()
        self.broken_writes: set[str] = set()
        self.broken_steps: set[str] = set()
        self.poisoned: set[str] = set()
        self.load_s: dict[str, float] = {}
        self.loads: list[str] = []
        self.steps: list[tuple[StepRow, ...]] = []
        self.writes: list[tuple[int, str]] = []
        self._slots: list[str | None] = [None] * num_slots
        self._kv: dict[tuple[int, int], tuple[int, str]] = {}

    def load_adapter(self, view: Path) -> str:
        assert threading.current_thread().name.startswith("adapter-load")
        time.sleep(self.load_s.get(view.name, 0))
        self.loads.append(view.name)
        if view.name in self.broken_loads:
            raise ValueError("half a tensor")
        return view.name

    def load_mix(self, parts: Sequence[tuple[Path, float]]) -> str:
        return "+".join(f"{weight:g}*{self.load_adapter(view)}" for view, weight in parts)

    def write_slot(self, slot: int, adapter: str) -> int:
        assert threading.current_thread().name == "steps"
        if adapter in self.broken_writes:
            raise ValueError("too wide")
        self._slots[slot] = adapter
        self.writes.append((slot, adapter))
        self.epoch += 1
        return self.epoch

    def clear_slot(self, slot: int) -> int:
        self._slots[slot] = None
        self.epoch += 1
        return self.epoch

    def step(self, rows: Sequence[StepRow], *, epoch: int) -> torch.Tensor:
        assert epoch == self.epoch
        self.gate.wait()
        time.sleep(self.step_s)
        self.steps.append(tuple(rows))
        blocks = [block for row in rows for block in row.block_ids]
        assert len(set(blocks)) == len(blocks), "two rows share a block"
        adapters = [self._adapter(row) for row in rows]
        if self.broken_steps & set(adapters):
            raise RuntimeError("out of memory")
        return torch.stack([self._logits(row, name) for row, name in zip(rows, adapters, strict=True)])

    def _adapter(self, row: StepRow) -> str:
        if row.slot < 0:
            return ""
        name = self._slots[row.slot]
        assert name is not None, "the slot was never written"
        return name

    def _logits(self, row: StepRow, adapter: str) -> torch.Tensor:
        for offset, token in enumerate(row.token_ids):
            self._kv[self._place(row, row.start + offset)] = (token, adapter)
        cells = [self._kv[self._place(row, position)] for position in range(row.start + len(row.token_ids))]
        assert {name for _, name in cells} == {adapter}, "keys and values of another adapter"
        logits = torch.zeros(VOCAB_SIZE)
        logits[expected_token([token for token, _ in cells], adapter)] = 5.0
        return logits * float("nan") if adapter in self.poisoned else logits

    def _place(self, row: StepRow, position: int) -> tuple[int, int]:
        return row.block_ids[position // self.block_size], position % self.block_size
