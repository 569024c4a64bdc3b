"""Decide what runs in the next step: which sequences, how many of their tokens, in which slots and blocks.

Continuous batching (https://www.usenix.org/conference/osdi22/presentation/yu) with chunked prefill
(https://arxiv.org/abs/2308.16369): sequences that decode run in every step, prompts share what is left of the token
budget. First come, first served. Knows no tensors, tokens' meaning, names or clients.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container
from dataclasses import dataclass, field
from itertools import count

from server.engine.blocks import BlockPool
from server.engine.slots import BASE_SLOT, SlotTable

__all__ = ["Limits", "Row", "Scheduler", "Sequence", "StepPlan"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much at once.

    max_sequences: rows of one step. max_step_tokens: tokens of one step; a CPU computes about this many per second with
    a model of 135 million parameters, so a long prompt delays the others' next token by at most that. max_waiting and
    max_waiting_tokens: beyond this the queue is full.
    """

    max_sequences: int = 32
    max_step_tokens: int = 256
    max_waiting: int = 256
    max_waiting_tokens: int = 1 << 20


@dataclass(slots=True, eq=False)
class Sequence:
    """One answer in the making. token_ids: prompt and answer so far; num_computed: how many have keys and values."""

    request_id: str
    digest: str | None
    token_ids: list[int]
    num_computed: int = 0
    block_ids: list[int] = field(default_factory=list[int])
    slot: int | None = None
    arrival: int = 0

    @property
    def num_left(self) -> int:
        """Tokens whose keys and values are missing; one for a sequence that decodes."""
        return len(self.token_ids) - self.num_computed


@dataclass(frozen=True, slots=True)
class Row:
    """The next tokens of one sequence.

    start: position of the first; is_sampled: whether they reach the end, so that their logits give a new token.
    """

    sequence: Sequence
    start: int
    token_ids: tuple[int, ...]
    is_sampled: bool


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step.

    writes: (slot, digest) to write before it; missing: digests to load before they can be written; epoch: the number of
    slot writes after which the rows may run, those of the plan included.
    """

    rows: tuple[Row, ...]
    writes: tuple[tuple[int, str], ...]
    missing: tuple[str, ...]
    epoch: int


class Scheduler:
    """Holds every sequence from `add` to `finish` and plans steps.

    Waiting is bounded: when the first waiting sequence lacks only a slot, no later one with an adapter may pass it, so
    it waits at most for the sequences that run now. Sequences of the bare base need no slot and may pass.
    """

    def __init__(self, slots: SlotTable, blocks: BlockPool, limits: Limits) -> None:
        self._slots = slots
        self._blocks = blocks
        self._limits = limits
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._arrivals = count()

    @property
    def num_waiting(self) -> int:
        """Sequences that have not begun, or were preempted."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences that have blocks."""
        return len(self._running)

    def add(self, sequence: Sequence) -> None:
        """Put a sequence at the end of the queue."""
        sequence.arrival = next(self._arrivals)
        self._waiting.append(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Forget a sequence, at any time, and give back its blocks and its slot."""
        if sequence in self._running:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)
        self._free_blocks(sequence)
        if sequence.slot is not None and sequence.slot != BASE_SLOT:
            self._slots.release(sequence.slot)
        sequence.slot = None

    def sequences_of(self, digest: str) -> list[Sequence]:
        """Every sequence of one adapter."""
        return [one for one in (*self._running, *self._waiting) if one.digest == digest]

    def waiting_for(self, digest: str) -> list[Sequence]:
        """Every sequence that waits for a slot with this adapter."""
        return [one for one in self._waiting if one.digest == digest and one.slot is None]

    def wanted_digests(self) -> list[str]:
        """Adapters to hold ready on the host: those without a slot that wait longest, as many as there are slots."""
        waiting = (one.digest for one in self._waiting if one.digest is not None and one.slot is None)
        wanted = dict.fromkeys(digest for digest in waiting if self._slots.find(digest) is None)
        return list(wanted)[: self._slots.num_slots]

    def advance(self, row: Row, token_id: int | None) -> None:
        """Record that a row was computed, and the token it gave."""
        row.sequence.num_computed += len(row.token_ids)
        if token_id is not None:
            row.sequence.token_ids.append(token_id)

    def schedule(self, *, loaded: Container[str]) -> StepPlan:
        """Plan the next step. loaded: digests that can be written into a slot at once.

        The plan holds until something is added, finished or advanced; a step that cannot run is simply planned again.
        """
        chosen = self._continue_running()
        writes: list[tuple[int, str]] = []
        self._admit(chosen, loaded, writes)
        rows = tuple(_row(*one) for one in chosen.items())
        missing = tuple(digest for digest in self.wanted_digests() if digest not in loaded)
        return StepPlan(rows, tuple(writes), missing, self._slots.epoch + len(writes))

    def _admit(self, chosen: dict[Sequence, int], loaded: Container[str], writes: list[tuple[int, str]]) -> None:
        """Start waiting sequences while there are tokens, rows, blocks and slots; adds to `chosen` and `writes`."""
        budget = self._limits.max_step_tokens - sum(chosen.values())
        is_slot_awaited = False
        for sequence in list(self._waiting):
            if budget <= 0 or len(self._running) >= self._limits.max_sequences:
                return
            if self._blocks.num_needed(len(sequence.token_ids) + 1) > self._blocks.num_free:
                return
            if sequence.slot is None and sequence.digest is not None and is_slot_awaited:
                continue
            if sequence.slot is None:
                sequence.slot = self._find_slot(sequence.digest, loaded, writes)
            if sequence.slot is not None:
                self._start(sequence)
                chosen[sequence] = min(budget, sequence.num_left)
                budget -= chosen[sequence]
            elif sequence.digest is not None and sequence.digest in loaded:
                is_slot_awaited = True  # Not for one that must be loaded first: that takes a moment; others may run.

    def _continue_running(self) -> dict[Sequence, int]:
        """Choose tokens of running sequences, those that decode first; preempt the latest when blocks run out."""
        chosen: dict[Sequence, int] = {}
        budget = self._limits.max_step_tokens
        by_age = sorted(self._running, key=lambda one: one.arrival)
        for sequence in sorted(by_age, key=lambda one: one.num_left > 1):
            if budget <= 0 or not self._grow(sequence, chosen):
                continue
            chosen[sequence] = min(budget, sequence.num_left)
            budget = self._limits.max_step_tokens - sum(chosen.values())
        return chosen

    def _grow(self, sequence: Sequence, chosen: dict[Sequence, int]) -> bool:
        """Make room for the tokens of a running sequence; False when it was itself preempted."""
        while sequence in self._running:
            num_more = self._blocks.num_needed(len(sequence.token_ids)) - len(sequence.block_ids)
            more = self._blocks.allocate(max(0, num_more))
            if more is not None:
                sequence.block_ids += more
                return True
            victim = max(self._running, key=lambda one: one.arrival)
            chosen.pop(victim, None)
            self._preempt(victim)
        return False

    def _preempt(self, sequence: Sequence) -> None:
        """Send a running sequence back to the front of the queue. It keeps its slot and computes its tokens again."""
        self._running.remove(sequence)
        self._free_blocks(sequence)
        sequence.num_computed = 0
        self._waiting.appendleft(sequence)

    def _start(self, sequence: Sequence) -> None:
        self._waiting.remove(sequence)
        blocks = self._blocks.allocate(self._blocks.num_needed(len(sequence.token_ids) + 1))
        assert blocks is not None
        sequence.block_ids = blocks
        self._running.append(sequence)

    def _find_slot(self, digest: str | None, loaded: Container[str], writes: list[tuple[int, str]]) -> int | None:
        """Begin to use the slot of an adapter, claiming one if needed and possible; adds to `writes`."""
        if digest is None:
            return BASE_SLOT
        slot = self._slots.acquire(digest)
        if slot is None and digest in loaded:
            slot = self._slots.claim(digest)
            if slot is not None:
                writes.append((slot, digest))
        return slot

    def _free_blocks(self, sequence: Sequence) -> None:
        self._blocks.free(sequence.block_ids)
        sequence.block_ids = []

    def check_integrity(self) -> None:
        """Check that blocks and slots are used exactly as the sequences say. Raises EngineStateError."""
        everyone = (*self._running, *self._waiting)
        self._blocks.check_integrity([block for one in everyone for block in one.block_ids])
        self._slots.check_integrity([one.slot for one in everyone if one.slot not in (None, BASE_SLOT)])


def _row(sequence: Sequence, num_tokens: int) -> Row:
    start = sequence.num_computed
    token_ids = tuple(sequence.token_ids[start : start + num_tokens])
    return Row(sequence, start, token_ids, is_sampled=num_tokens == sequence.num_left)
