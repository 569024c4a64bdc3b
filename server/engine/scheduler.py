"""Decide what runs in the next step: which sequences, how many of their tokens, in which slots and blocks.

Continuous batching (https://www.usenix.org/conference/osdi22/presentation/yu) with chunked prefill
(https://arxiv.org/abs/2308.16369): sequences that decode run in every step, prompts share what is left of the token
budget. When blocks run out, the least urgent sequence gives way and computes its tokens again later. Who starts next is
the business of `server.engine.fairness`. Knows no tensors, tokens' meaning, names or clients.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from itertools import takewhile

from server.engine.blocks import BlockPool
from server.engine.fairness import FairQueue
from server.engine.prefix import block_hash, root_hash
from server.engine.sequence import Limits, Row, Sequence, StepPlan
from server.engine.slot_plan import SlotPlan
from server.engine.slots import BASE_SLOT, SlotTable

__all__ = ["Scheduler"]


class Scheduler:
    """Holds every sequence from `add` to `finish` and plans steps.

    Waiting is bounded. The order in which sequences start is fair, and a loaded adapter that lacks only a slot has one
    reserved: the one in use that is free soonest takes no further sequence, while those of all other slots go on.

    base_digest: part of the identity of computed blocks.
    """

    def __init__(self, slots: SlotTable, blocks: BlockPool, limits: Limits, *, base_digest: str = "") -> None:
        self._slots = slots
        self._blocks = blocks
        self._limits = limits
        self._base_digest = base_digest
        self._waiting = FairQueue(lead_tokens=limits.lead_tokens, ageing_steps=limits.ageing_steps)
        self._running: list[Sequence] = []
        self.wanted: tuple[str, ...] = ()
        self.num_cached_tokens = 0

    @property
    def num_waiting(self) -> int:
        """Sequences that have not begun, or were preempted."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences that have blocks."""
        return len(self._running)

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait for its turn."""
        if self._limits.prefix_cache:
            sequence.hashes = [root_hash(self._base_digest, digest=sequence.digest, tenant=sequence.tenant)]
        self._waiting.add(sequence)

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

    def advance(self, row: Row, token_id: int | None) -> None:
        """Record that a row was computed, and the token it gave; its full blocks can be used by others from now on."""
        sequence = row.sequence
        sequence.num_computed += len(row.token_ids)
        first, last = row.start // self._blocks.block_size, sequence.num_computed // self._blocks.block_size
        if self._limits.prefix_cache and last > first:
            hashes = self._hashes(sequence, last)
            for idx in range(first, last):
                self._blocks.register(sequence.block_ids[idx], hashes[idx])
        if token_id is not None:
            sequence.token_ids.append(token_id)
            self._waiting.charge(sequence, num_output=1)

    def schedule(self, *, loaded: Container[str], slow: Container[str] = ()) -> StepPlan:
        """Plan the next step.

        loaded: digests that can be written into a slot at once; slow: digests whose load takes so long that others
        should be loaded in their stead. The plan holds until something is added, finished or advanced; a step that
        cannot run is simply planned again.
        """
        chosen = self._continue_running()
        plan = SlotPlan(self._slots, loaded=loaded, users=self._slot_users, waiting=self._waiting)
        pending = self._hashes_in_progress()
        wanted = _Wanted(self._slots, plan.needed, slow)
        is_open = self._has_room(chosen)
        for sequence in self._waiting.in_order(frozenset(self._slots.digests())):
            if not is_open and wanted.is_complete:
                break
            if is_open and not self._is_computed_soon(sequence, pending) and plan.has_place_for(sequence):
                is_open = self._start(sequence, chosen, plan, pending) and self._has_room(chosen)
            wanted.note(sequence.digest)
        self.wanted = tuple(wanted.digests)
        plan.fill_unused(self.wanted)
        if chosen:
            self._waiting.tick()
        missing = tuple(digest for digest in self.wanted if digest not in loaded)
        rows = tuple(_row(*one) for one in chosen.items())
        return StepPlan(rows, tuple(plan.writes), missing, self._slots.epoch + len(plan.writes))

    def _has_room(self, chosen: dict[Sequence, int]) -> bool:
        return len(self._running) < self._limits.max_sequences and sum(chosen.values()) < self._limits.max_step_tokens

    def _start(self, sequence: Sequence, chosen: dict[Sequence, int], plan: SlotPlan, pending: set[bytes]) -> bool:
        """Start a sequence that has a place; False when blocks are missing, for which no later one may pass it."""
        shared = self._blocks.match(self._reusable(sequence))
        num_new = self._blocks.num_needed(len(sequence.token_ids) + 1) - len(shared)
        blocks = self._blocks.take(shared, num_new=num_new)
        if blocks is None:
            return False
        is_first_start = sequence.slot is None
        if sequence.slot is None:
            sequence.slot = plan.take_place(sequence)
        self._waiting.remove(sequence)
        self._running.append(sequence)
        sequence.block_ids = blocks
        sequence.num_computed = len(shared) * self._blocks.block_size
        if is_first_start:
            sequence.num_cached = sequence.num_computed
            self.num_cached_tokens += sequence.num_cached
            self._waiting.charge(sequence, num_prompt=sequence.num_left)
        pending.update(self._reusable(sequence)[len(shared) :])
        chosen[sequence] = min(self._limits.max_step_tokens - sum(chosen.values()), sequence.num_left)
        return True

    def _is_computed_soon(self, sequence: Sequence, pending: Container[bytes]) -> bool:
        """Tell whether running sequences compute at least half of what this one would have to compute."""
        if not pending:
            return False
        hashes = self._reusable(sequence)
        num_cached = len(self._blocks.match(hashes))
        num_soon = sum(1 for _ in takewhile(pending.__contains__, hashes[num_cached:]))
        size = self._blocks.block_size
        return num_soon > 0 and 2 * num_soon * size >= len(sequence.token_ids) - num_cached * size

    def _hashes_in_progress(self) -> set[bytes]:
        """Return the hashes of blocks that running sequences fill with tokens they have already."""
        size = self._blocks.block_size
        filling = (one for one in self._running if one.num_left > 1) if self._limits.prefix_cache else ()
        return {
            block_hash
            for one in filling
            for block_hash in self._hashes(one, len(one.token_ids) // size)[one.num_computed // size :]
        }

    def _reusable(self, sequence: Sequence) -> list[bytes]:
        """Return the hashes of the full blocks before the last token, whose logits are needed in any case."""
        if not self._limits.prefix_cache:
            return []
        return self._hashes(sequence, (len(sequence.token_ids) - 1) // self._blocks.block_size)

    def _hashes(self, sequence: Sequence, num_blocks: int) -> list[bytes]:
        """Return the hashes of the first blocks of a sequence, computing those that are new."""
        size, chain = self._blocks.block_size, sequence.hashes
        for idx in range(len(chain) - 1, num_blocks):
            chain.append(block_hash(chain[-1], sequence.token_ids[idx * size : (idx + 1) * size]))
        return chain[1 : num_blocks + 1]

    def _continue_running(self) -> dict[Sequence, int]:
        """Choose tokens of running sequences, those that decode first; preempt some when blocks run out."""
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
            victim = max(self._running, key=lambda one: (one.level, one.arrival))
            chosen.pop(victim, None)
            self._preempt(victim)
        return False

    def _preempt(self, sequence: Sequence) -> None:
        """Let a running sequence wait again. It keeps its slot; its full blocks stay as long as there is room."""
        self._running.remove(sequence)
        self._free_blocks(sequence)
        sequence.num_computed = 0
        self._waiting.add(sequence)

    def _free_blocks(self, sequence: Sequence) -> None:
        self._blocks.free(sequence.block_ids)
        sequence.block_ids = []

    def _slot_users(self) -> list[Sequence]:
        return [one for one in (*self._running, *self._waiting) if one.slot not in (None, BASE_SLOT)]

    def check_integrity(self) -> None:
        """Check that blocks and slots are used exactly as the sequences say. Raises EngineStateError."""
        everyone = (*self._running, *self._waiting)
        self._blocks.check_integrity([block for one in everyone for block in one.block_ids])
        self._slots.check_integrity([one.slot for one in self._slot_users() if one.slot is not None])


class _Wanted:
    """The adapters to hold ready on the host: those without a slot that are next, as many as there are slots.

    Those whose load is slow do not count, so that others are loaded in their stead.
    """

    def __init__(self, slots: SlotTable, needed: Iterable[str], slow: Container[str]) -> None:
        self._slots = slots
        self._unseen = {digest for digest in needed if slots.find(digest) is None}
        self._slow = slow
        self._num_left = slots.num_slots
        self.digests: list[str] = []

    @property
    def is_complete(self) -> bool:
        return self._num_left == 0 or not self._unseen

    def note(self, digest: str | None) -> None:
        """Add the next adapter in order, unless it has a slot, maybe since a moment."""
        if digest in self._unseen and not self.is_complete:
            self._unseen.remove(digest)
            if self._slots.find(digest) is None:
                self.digests.append(digest)
                self._num_left -= digest not in self._slow


def _row(sequence: Sequence, num_tokens: int) -> Row:
    start = sequence.num_computed
    token_ids = tuple(sequence.token_ids[start : start + num_tokens])
    return Row(sequence, start, token_ids, is_sampled=num_tokens == sequence.num_left)
