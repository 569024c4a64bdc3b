"""Where adapters are: on disk, on the host, on the device (in a slot).

An adapter that loses its slot stays on the host, so that it comes back without the disk. The host keeps a number of
bytes; beyond it goes what is worth least: uses x time to load / bytes (`server.engine.eviction`). Knows digests, sizes
and slots; no tensors and no requests. Belongs to the step thread; the other threads only look.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping
from typing import Any, Protocol

from adapterhub.errors import AdapterLoadError
from server.engine.eviction import GreedyDual
from server.engine.slots import SlotTable
from server.engine.types import Tier

__all__ = ["Residency", "SlotWriter"]

_log = logging.getLogger(__name__)


class SlotWriter(Protocol):
    """What writing slots needs of `server.engine.runner.Runner`."""

    num_slots: int

    @property
    def epoch(self) -> int:
        """Number of slot writes so far."""
        ...

    def write_slot(self, slot: int, adapter: Any) -> int:
        """Put an adapter into a slot and return the new epoch."""
        ...

    def clear_slot(self, slot: int) -> int:
        """Empty a slot and return the new epoch."""
        ...


class Residency:
    """Holds every loaded adapter and writes the slots.

    host_bytes: for adapters that are in no slot; those that waiting requests need next are kept beyond it. slow:
    digests whose load takes long.
    """

    def __init__(self, runner: SlotWriter, *, host_bytes: int) -> None:
        self._runner = runner
        self._host_bytes = host_bytes
        self._adapters: dict[str, Any] = {}
        self._worth: GreedyDual[str] = GreedyDual()
        self.slots = SlotTable(runner.num_slots)
        self.slots.epoch = runner.epoch
        self.slow: set[str] = set()

    @property
    def loaded(self) -> Mapping[str, object]:
        """Adapters that can be written into a slot at once."""
        return self._adapters

    def tiers(self) -> dict[str, Tier]:
        """Return where each adapter is that is not only on disk."""
        return {one: "host" if self.slots.find(one) is None else "device" for one in sorted(self._adapters)}

    def keep(self, digest: str, adapter: Any, *, load_s: float, wanted: Collection[str]) -> None:
        """Take an adapter that was loaded. wanted: digests that do not give way to it."""
        self._adapters[digest] = adapter
        self._worth.add(digest, cost=load_s, size=adapter.size_bytes)
        self._worth.use(digest)
        self.trim(wanted)

    def write(self, slot: int, digest: str) -> AdapterLoadError | None:
        """Write a claimed slot. Return why it cannot be; then the adapter is forgotten and the slot must be emptied."""
        started_s = time.monotonic()
        try:
            self.slots.epoch = self._runner.write_slot(slot, self._adapters[digest])
        except Exception as exc:  # What cannot be written ends its own requests, not the loop.
            _log.exception("adapter %s cannot be written to slot %d", digest, slot)
            self._forget(digest)
            what = f"Adapter {digest[:12]} does not fit into a slot: {str(exc).rstrip('.')}."
            return AdapterLoadError(what, "Choose another version.")
        self.slots.note_cost(digest, cost_s=time.monotonic() - started_s)
        self._worth.use(digest)
        return None

    def write_ahead(self, digest: str, *, wanted: Collection[str]) -> None:
        """Write an adapter that nobody waits for into a slot that nobody uses, if there is one."""
        slot = self.slots.claim(digest, keep=wanted)
        if slot is not None:
            error = self.write(slot, digest)
            self.slots.release(slot)
            if error is not None:
                self.empty(slot)
        self.trim(wanted)

    def empty(self, slot: int) -> None:
        """Leave nothing of an adapter that was written in part."""
        self.slots.discard(slot)
        self.slots.epoch = self._runner.clear_slot(slot)

    def unload(self, digest: str) -> bool:
        """Forget an adapter, unless its slot has users. Return whether it is gone."""
        slot = self.slots.find(digest)
        if slot is not None and self.slots.num_users(slot):
            return False
        if slot is not None:
            self.empty(slot)
        if digest in self._adapters:
            self._forget(digest)
        return True

    def trim(self, wanted: Collection[str]) -> None:
        """Forget adapters in no slot until the host holds no more than it may."""
        spare = [one for one in self._adapters if self.slots.find(one) is None and one not in wanted]
        num_bytes = sum(self._adapters[one].size_bytes for one in spare)
        while num_bytes > self._host_bytes:
            worst = self._worth.worst(spare)
            spare.remove(worst)
            num_bytes -= self._adapters.pop(worst).size_bytes
            self._worth.evict(worst)

    def _forget(self, digest: str) -> None:
        del self._adapters[digest]
        self._worth.remove(digest)
