"""Which adapter is in which slot, and who uses it. Knows digests, no tensors and no names.

A slot in use is never given to another adapter; among the others the one whose adapter is worth least is (uses x time
to write it again, see `server.engine.eviction`). The epoch is the runner's count of slot writes: a step planned for one
epoch is refused in another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass

from adapterhub.errors import EngineStateError
from server.engine.eviction import GreedyDual

__all__ = ["BASE_SLOT", "SlotTable"]

BASE_SLOT = -1
# What writing an adapter is taken to cost until it has been measured.
_UNKNOWN_COST_S = 0.01


@dataclass(slots=True)
class _Slot:
    digest: str | None = None
    num_users: int = 0


class SlotTable:
    """`num_slots` slots with reference counts."""

    def __init__(self, num_slots: int) -> None:
        self._slots = [_Slot() for _ in range(num_slots)]
        self._slot_of: dict[str, int] = {}
        self._worth: GreedyDual[str] = GreedyDual()
        self.epoch = 0

    @property
    def num_slots(self) -> int:
        """Slots in all."""
        return len(self._slots)

    def find(self, digest: str) -> int | None:
        """Return the slot that holds `digest`, or None."""
        return self._slot_of.get(digest)

    def num_users(self, slot: int) -> int:
        """Return how many use a slot."""
        return self._slots[slot].num_users

    def digests(self) -> list[str]:
        """Return what is resident."""
        return list(self._slot_of)

    @property
    def has_unused(self) -> bool:
        """Tell whether a slot has no user."""
        return any(slot.num_users == 0 for slot in self._slots)

    def acquire(self, digest: str) -> int | None:
        """Begin to use the slot that holds `digest`, or None when none does."""
        slot = self._slot_of.get(digest)
        if slot is not None:
            self._use(slot, digest)
        return slot

    def claim(self, digest: str, *, keep: Container[str] = ()) -> int | None:
        """Give a slot without users to `digest` and begin to use it, or None when there is none.

        keep: adapters that do not give way. The caller must write the adapter into the slot before the next step, or
        `discard` it.
        """
        if digest in self._slot_of:
            raise EngineStateError(f"Adapter {digest!r} has a slot already.", "Acquire it instead.")
        slot = self._find_unused(keep)
        if slot is None:
            return None
        self._slots[slot].digest = digest
        self._slot_of[digest] = slot
        self._worth.add(digest, cost=_UNKNOWN_COST_S, size=1)
        self._use(slot, digest)
        return slot

    def note_cost(self, digest: str, *, cost_s: float) -> None:
        """Remember how long an adapter takes to be written again; it has a slot."""
        self._worth.add(digest, cost=cost_s, size=1)

    def release(self, slot: int) -> None:
        """Stop to use a slot; the adapter stays until another needs the place."""
        if self._slots[slot].num_users == 0:
            raise EngineStateError(f"Slot {slot} is released but has no user.", "This is a mistake in the engine.")
        self._slots[slot].num_users -= 1

    def discard(self, slot: int) -> None:
        """Forget what a slot holds, because writing it failed. Raises EngineStateError while the slot has users."""
        if self._slots[slot].num_users:
            raise EngineStateError(
                f"Slot {slot} is discarded but has {self._slots[slot].num_users} users.", "Release it first."
            )
        digest = self._slots[slot].digest
        if digest is not None:
            self._worth.remove(digest)
            del self._slot_of[digest]
            self._slots[slot].digest = None

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

    def _find_unused(self, keep: Container[str]) -> int | None:
        """Return an empty slot, else empty the one without users that is worth least, else None."""
        spare: list[str] = []
        for idx, slot in enumerate(self._slots):
            if slot.digest is None:
                return idx
            if slot.num_users == 0 and slot.digest not in keep:
                spare.append(slot.digest)
        if not spare:
            return None
        victim = self._worth.worst(spare)
        self._worth.evict(victim)
        return self._slot_of.pop(victim)

    def _use(self, slot: int, digest: str) -> None:
        self._slots[slot].num_users += 1
        self._worth.use(digest)
