"""Hot swap: when an alias moves, bring the adapter it points to now close to the device.

The move itself needs no help, because names are resolved per request; this only spares the first request the load.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from adapterhub.errors import AdapterHubError, BaseMismatchError, NotFoundError
from server.engine.types import Engine
from server.http.adapters import AdapterNames

__all__ = ["AliasWatcher"]

_log = logging.getLogger(__name__)
_POLL_S = 0.2  # A fifth of the second within which a move must be visible.


class AliasWatcher:
    """Polls the store's log and preloads what was newly aliased."""

    def __init__(self, engine: Engine, adapters: AdapterNames) -> None:
        self._engine = engine
        self._adapters = adapters
        self._head = -1
        self._known: Mapping[tuple[str, str], str] = {}

    async def run(self) -> None:
        """Watch until cancelled. A poll that fails is logged and tried again."""
        while True:
            try:
                await self._poll()
            except AdapterHubError as error:
                _log.warning("the alias log cannot be read; trying again: %s", error)
            except Exception:  # The watch must outlive a locked or missing database file.
                _log.exception("the alias log cannot be read; trying again")
            await asyncio.sleep(_POLL_S)

    async def _poll(self) -> None:
        head = await asyncio.to_thread(self._adapters.store.log_head)
        if head == self._head:
            return
        is_first = self._head < 0
        known = await asyncio.to_thread(self._aliases)
        moved = [name for name, digest in known.items() if self._known.get(name) != digest]
        self._head, self._known = head, known
        if not is_first:
            for task, name in moved:
                await self._preload(task, name)

    def _aliases(self) -> dict[tuple[str, str], str]:
        return {(one.task, one.name): one.serving_digest for one in self._adapters.store.aliases()}

    async def _preload(self, task: str, name: str) -> None:
        label = f"{task}@{name}"
        try:
            choice = await asyncio.to_thread(self._adapters.resolve, label)
            if choice.handle is not None:
                _log.info("%s is now %s; loading it", label, choice.label)
                await self._engine.load(choice.handle)
        except (BaseMismatchError, NotFoundError):
            return  # For another base, or removed meanwhile: not ours to load.
        except Exception as error:  # The other aliases must still be loaded.
            is_ours = isinstance(error, AdapterHubError)
            _log.warning("%r points to an adapter that cannot be loaded ahead: %s", label, error, exc_info=not is_ours)
