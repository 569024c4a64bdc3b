"""The slots of one step: which are written before it, and which take no further sequence because others wait for them.

Knows sequences and slots, no blocks, tokens and tensors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Iterable

from server.engine.sequence import Sequence
from server.engine.slots import BASE_SLOT, SlotTable

__all__ = ["SlotPlan"]


class SlotPlan:
    """Gives slots to sequences, asked in the order in which they may start.

    loaded: digests that can be written at once; users: the sequences that hold slots; waiting: those that want to run.
    needed: their digests. writes: (slot, digest), in the order in which they are to be written.
    """

    def __init__(
        self,
        slots: SlotTable,
        *,
        loaded: Container[str],
        users: Callable[[], Iterable[Sequence]],
        waiting: Iterable[Sequence],
    ) -> None:
        self._slots = slots
        self._loaded = loaded
        self._users = users
        self.needed = {one.digest for one in waiting if one.digest is not None}
        self._reserved: dict[str, int] = {}
        self.writes: list[tuple[int, str]] = []

    def has_place_for(self, sequence: Sequence) -> bool:
        """Tell whether a sequence can have a slot now; one whose adapter lacks only that gets a slot reserved."""
        digest = sequence.digest
        if digest is None or sequence.slot is not None:
            return True
        slot = self._slots.find(digest)
        if slot is not None:
            return slot not in self._reserved.values()
        if digest not in self._loaded:
            return False  # It must be loaded first, which takes a moment; others may run.
        if self._slots.has_unused:
            return True
        self._reserve(digest)
        return False

    def take_place(self, sequence: Sequence) -> int:
        """Begin to use the slot that `has_place_for` found."""
        if sequence.digest is None:
            return BASE_SLOT
        slot = self._slots.acquire(sequence.digest)
        if slot is None:
            # Rather not one whose adapter is asked for, but the order of the queue decides.
            slot = self._slots.claim(sequence.digest, keep=self.needed)
            slot = self._slots.claim(sequence.digest) if slot is None else slot
            assert slot is not None
            self.writes.append((slot, sequence.digest))
        return slot

    def fill_unused(self, wanted: Iterable[str]) -> None:
        """Write adapters that will be needed into slots that nobody uses and nobody waits for."""
        for digest in wanted:
            if digest in self._loaded and self._slots.find(digest) is None:
                slot = self._slots.claim(digest, keep=self.needed)
                if slot is None:
                    return
                self.writes.append((slot, digest))
                self._slots.release(slot)

    def _reserve(self, digest: str) -> None:
        """Let the slot that is free soonest take no further sequence."""
        if digest in self._reserved:
            return
        steps_left: defaultdict[int, int] = defaultdict(int)
        for user in self._users():
            if user.slot is not None and user.slot not in self._reserved.values():
                steps_left[user.slot] = max(steps_left[user.slot], user.num_to_come)
        if steps_left:
            self._reserved[digest] = min(steps_left, key=lambda slot: (steps_left[slot], slot))
