"""Which adapter is in which slot, and who uses it. Knows digests, no tensors and no names.

A slot in use is never given to another adapter. The epoch is the runner's count of slot writes: a step planned for one
epoch is refused in another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from adapterhub.errors import EngineStateError

__all__ = ["BASE_SLOT", "SlotTable"]

BASE_SLOT = -1


@dataclass(slots=True)
class _Slot:
    digest: str | None = None
    num_users: int = 0
    last_used: int = 0


class SlotTable:
    """`num_slots` slots with reference counts; among slots without users the one unused for longest is given away."""

    def __init__(self, num_slots: int) -> None:
        self._slots = [_Slot() for _ in range(num_slots)]
        self._slot_of: dict[str, int] = {}
        self._clock = count(1)
        self.epoch = 0

    @property
    def num_slots(self) -> int:
        """Slots in all."""
        return len(self._slots)

    def find(self, digest: str) -> int | None:
        """Return the slot that holds `digest`, or None."""
        return self._slot_of.get(digest)

    def digests(self) -> list[str]:
        """Return what is resident."""
        return list(self._slot_of)

    def acquire(self, digest: str) -> int | None:
        """Begin to use the slot that holds `digest`, or None when none does."""
        slot = self._slot_of.get(digest)
        if slot is not None:
            self._use(slot)
        return slot

    def claim(self, digest: str) -> int | None:
        """Give a slot without users to `digest` and begin to use it, or None when all are in use.

        The caller must write the adapter into the slot before the next step, or `discard` it.
        """
        if digest in self._slot_of:
            raise EngineStateError(f"Adapter {digest!r} has a slot already.", "Acquire it instead.")
        unused = [idx for idx, slot in enumerate(self._slots) if slot.num_users == 0]
        if not unused:
            return None
        slot = min(unused, key=lambda idx: self._slots[idx].last_used)
        self._forget(slot)
        self._slots[slot].digest = digest
        self._slot_of[digest] = slot
        self._use(slot)
        return slot

    def release(self, slot: int) -> None:
        """Stop to use a slot; the adapter stays until another needs the place."""
        if self._slots[slot].num_users == 0:
            raise EngineStateError(f"Slot {slot} is released but has no user.", "This is a mistake in the engine.")
        self._slots[slot].num_users -= 1
        self._slots[slot].last_used = next(self._clock)

    def discard(self, slot: int) -> None:
        """Forget what a slot holds, because writing it failed. Raises EngineStateError while the slot has users."""
        if self._slots[slot].num_users:
            raise EngineStateError(
                f"Slot {slot} is discarded but has {self._slots[slot].num_users} users.", "Release it first."
            )
        self._forget(slot)

    def check_integrity(self, in_use: Sequence[int]) -> None:
        """Check that `in_use` names each slot once per user. Raises EngineStateError naming the slots that differ."""
        users = Counter(in_use)
        wrong = [idx for idx, slot in enumerate(self._slots) if slot.num_users != users[idx]]
        holders = {slot.digest: idx for idx, slot in enumerate(self._slots) if slot.digest is not None}
        wrong += [idx for digest, idx in holders.items() if self._slot_of.get(digest) != idx]
        if wrong or len(holders) != len(self._slot_of):
            raise EngineStateError(
                f"The slot table and its users disagree about slots {sorted(set(wrong))}.",
                "This is a mistake in the engine; restart the server and report it.",
            )

    def _use(self, slot: int) -> None:
        self._slots[slot].num_users += 1
        self._slots[slot].last_used = next(self._clock)

    def _forget(self, slot: int) -> None:
        digest = self._slots[slot].digest
        if digest is not None:
            del self._slot_of[digest]
            self._slots[slot].digest = None
