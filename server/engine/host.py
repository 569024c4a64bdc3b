"""Adapters on their way to the device: loaded from disk in threads of their own, away from the step loop.

Knows digests and outcomes. What a loaded adapter is, is the runner's business.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Generic, TypeVar

from adapterhub.errors import AdapterHubError, AdapterLoadError
from server.engine.types import AdapterHandle

__all__ = ["Loads"]

_log = logging.getLogger(__name__)
_NUM_THREADS = 2  # One slow disk must not hold up every other adapter.
_T = TypeVar("_T")


class Loads(Generic[_T]):
    """Loads each adapter once, however many ask for it at the same time. Safe for several threads."""

    def __init__(self, load: Callable[[Path], _T]) -> None:
        self._load = load
        self._threads = ThreadPoolExecutor(_NUM_THREADS, "adapter-load")
        self._lock = threading.Lock()
        self._running: dict[str, Future[_T]] = {}

    def start(self, handle: AdapterHandle, on_done: Callable[[AdapterHandle, Future[_T]], None]) -> Future[_T]:
        """Begin to load, unless that adapter is being loaded; `on_done` is called once per load, in its thread.

        The future fails with AdapterLoadError.
        """
        with self._lock:
            if handle.digest in self._running:
                return self._running[handle.digest]
            future: Future[_T] = Future()
            self._running[handle.digest] = future
        self._threads.submit(self._run, handle, future, on_done)
        return future

    def _run(
        self, handle: AdapterHandle, future: Future[_T], on_done: Callable[[AdapterHandle, Future[_T]], None]
    ) -> None:
        try:
            future.set_result(self._load(handle.view))
        except Exception as exc:  # One broken adapter must not end the thread; its requests hear of it.
            if not isinstance(exc, AdapterHubError):
                _log.exception("adapter %s cannot be loaded", handle.label)
            future.set_exception(_load_error(handle, exc))
        with self._lock:
            del self._running[handle.digest]
        on_done(handle, future)

    def stop(self) -> None:
        """Start no further load."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _load_error(handle: AdapterHandle, exc: Exception) -> AdapterLoadError:
    error = AdapterLoadError(
        f"Adapter {handle.label!r} cannot be loaded: {str(exc).rstrip('.')}.",
        f"Check it with `hub adapters verify {handle.label}`, or choose another version.",
    )
    error.__cause__ = exc
    return error
