"""Adapters on their way to the device: loaded from disk in threads of their own, away from the step loop.

Knows digests and outcomes. What a loaded adapter is, is the runner's business.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Generic, TypeVar

from adapterhub.errors import AdapterHubError, AdapterLoadError, OverloadedError
from server.engine.types import AdapterHandle

__all__ = ["Loads"]

_log = logging.getLogger(__name__)
_NUM_THREADS = 2  # One slow disk must not hold up every other adapter.
_T = TypeVar("_T")


class Loads(Generic[_T]):
    """Loads each adapter once, however many ask for it at the same time. Safe for several threads."""

    def __init__(
        self, load_adapter: Callable[[Path], _T], load_mix: Callable[[Sequence[tuple[Path, float]]], _T]
    ) -> None:
        self._load_adapter = load_adapter
        self._load_mix = load_mix
        self._threads = ThreadPoolExecutor(_NUM_THREADS, "adapter-load")
        self._lock = threading.Lock()
        self._running: dict[str, Future[_T]] = {}
        self._is_stopped = False

    def start(self, handle: AdapterHandle, on_done: Callable[[AdapterHandle, Future[_T]], None]) -> Future[_T]:
        """Begin to load, unless that adapter is being loaded; `on_done` is called once per load, in its thread.

        The future fails with AdapterLoadError and cannot be cancelled, because others may wait for it too. Raises
        OverloadedError after `stop`.
        """
        with self._lock:
            if self._is_stopped:
                raise OverloadedError("The server is shutting down.", "Send the request again later.")
            if handle.digest in self._running:
                return self._running[handle.digest]
            future: Future[_T] = Future()
            future.set_running_or_notify_cancel()
            self._running[handle.digest] = future
            self._threads.submit(self._run, handle, future, on_done)
        return future

    def _run(
        self, handle: AdapterHandle, future: Future[_T], on_done: Callable[[AdapterHandle, Future[_T]], None]
    ) -> None:
        try:
            future.set_result(self._load_unless_stopped(handle))
        except BaseException as exc:  # One broken adapter must not end the thread; its requests hear of it.
            if not isinstance(exc, AdapterHubError):
                _log.exception("adapter %s cannot be loaded", handle.label)
            future.set_exception(_load_error(handle, exc))
        finally:
            with self._lock:
                del self._running[handle.digest]
            on_done(handle, future)

    def _load_unless_stopped(self, handle: AdapterHandle) -> _T:
        if self._is_stopped:
            raise OverloadedError("The server is shutting down.", "Ask another server, or again later.")
        if handle.is_mix:
            return self._load_mix([(part.open_view(), part.weight) for part in handle.parts])
        return self._load_adapter(handle.parts[0].open_view())

    def stop(self) -> None:
        """Start no further load; those that wait for a thread fail."""
        with self._lock:
            self._is_stopped = True
        self._threads.shutdown(wait=False)


def _load_error(handle: AdapterHandle, exc: BaseException) -> AdapterLoadError:
    labels = " ".join(part.label for part in handle.parts)
    what, hint = str(exc), f"Check it with `hub adapters verify {labels}`, or choose another version."
    if isinstance(exc, OverloadedError):
        what, hint = exc.what, exc.hint
    error = AdapterLoadError(f"Adapter {handle.label!r} cannot be loaded: {what.rstrip('.')}.", hint)
    error.__cause__ = exc
    return error
