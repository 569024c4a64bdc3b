"""A runner without a model. It reads each row's history back through its blocks, so wrong blocks give wrong answers."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from server.engine.runner import StepRow
from tests.support.tiny_models import VOCAB_SIZE

__all__ = ["FakeAdapter", "FakeRunner", "expected_token"]


@dataclass(frozen=True)
class FakeAdapter:
    """Changes every next token by its name."""

    name: str
    size_bytes: int
    measure: None = None


def expected_token(history: Sequence[int], adapter: str) -> int:
    """Return the token that follows `history` with the adapter of that name ("" for the base)."""
    return (sum(token * (idx + 1) for idx, token in enumerate(history)) * 31 + sum(adapter.encode())) % 256


class FakeRunner:
    """Deterministic next tokens from the whole history and the adapter; counts steps and checks every promise.

    The adapter of a view is the name of its folder; a mix has the names and weights of its parts. Rows may read blocks
    that others read; each place remembers the whole history it was computed from, and a row that reads another history,
    or writes where another reads, fails an assertion. broken_*: names that fail; poisoned: names whose logits are NaN;
    sizes: bytes per adapter, where not 1 MiB; gate: steps wait while it is cleared; load_gates: loads wait likewise.
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
        self.sizes: dict[str, int] = {}
        self.load_gates: dict[str, threading.Event] = {}
        self._kv: dict[tuple[int, int], tuple[int, int]] = {}  # Place -> token, hash of the history up to it.

    def load_adapter(self, view: Path) -> FakeAdapter:
        return self._load(view.name)

    def load_mix(self, parts: Sequence[tuple[Path, float]]) -> FakeAdapter:
        return self._load("+".join(f"{weight:g}*{view.name}" for view, weight in parts))

    def _load(self, name: str) -> FakeAdapter:
        assert threading.current_thread().name.startswith("adapter-load")
        time.sleep(self.load_s.get(name, 0))
        if name in self.load_gates:
            self.load_gates[name].wait()
        self.loads.append(name)
        if name in self.broken_loads:
            raise ValueError("half a tensor")
        return FakeAdapter(name, self.sizes.get(name, 1 << 20))

    def write_slot(self, slot: int, adapter: FakeAdapter) -> int:
        assert threading.current_thread().name == "steps"
        if adapter.name in self.broken_writes:
            raise ValueError("too wide")
        self._slots[slot] = adapter.name
        self.writes.append((slot, adapter.name))
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
        users = Counter(block for row in rows for block in row.block_ids)
        written = {block for row in rows for block in row.block_ids[row.start // self.block_size :]}
        assert all(users[block] == 1 for block in written), "a row writes where another reads"
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
        history: list[int] = []
        origin = hash(adapter)
        for position in range(row.start):
            token, origin_there = self._kv[self._place(row, position)]
            origin = hash((origin, token))
            assert origin_there == origin, "keys and values of another adapter or another beginning"
            history.append(token)
        for offset, token in enumerate(row.token_ids):
            origin = hash((origin, token))
            self._kv[self._place(row, row.start + offset)] = (token, origin)
            history.append(token)
        logits = torch.zeros(VOCAB_SIZE)
        logits[expected_token(history, adapter)] = 5.0
        return logits * float("nan") if adapter in self.poisoned else logits

    def _place(self, row: StepRow, position: int) -> tuple[int, int]:
        return row.block_ids[position // self.block_size], position % self.block_size
