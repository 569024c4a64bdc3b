"""Adapters on their way to the host: loaded from disk in threads of their own, away from the step loop.

A load that takes long gives its turn to the next one; a load that takes too long fails, although its thread cannot be
ended. Knows handles and outcomes. What a loaded adapter is, is the runner's business.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from adapterhub.errors import AdapterHubError, AdapterLoadError, OverloadedError
from server.engine.types import AdapterHandle

__all__ = ["AdapterLoader", "LoadListener", "Loads", "load_parts"]

_log = logging.getLogger(__name__)
_NUM_TURNS = 2  # Loads at a time that are not slow: more would take the processor from the steps.
_SLOW_S = 2.0  # Far longer than a healthy disk takes; from then on the load's turn goes to another.
_MAX_THREADS = 64  # Slow loads included.
_T = TypeVar("_T")


class AdapterLoader(Protocol):
    """What loading needs of `server.engine.runner.Runner`."""

    def load_adapter(self, view: Path) -> Any:
        """Load the adapter of a view."""
        ...

    def load_mix(self, parts: Sequence[tuple[Path, float]]) -> Any:
        """Load the weighted sum of the adapters of some views."""
        ...


class LoadListener(Protocol):
    """Who hears of loads, in any thread."""

    def on_loaded(self, handle: AdapterHandle, outcome: Future[Any], *, load_s: float) -> None:
        """Take the outcome of a load, once per load; and again when one that timed out is asked for again."""
        ...

    def on_slow(self, handle: AdapterHandle) -> None:
        """Hear that a load takes long."""
        ...


def load_parts(runner: AdapterLoader, handle: AdapterHandle) -> Any:
    """Load what a handle names: one adapter as it is, or a weighted mix."""
    if len(handle.parts) == 1 and handle.parts[0].weight == 1:
        return runner.load_adapter(handle.parts[0].open_view())
    return runner.load_mix([(part.open_view(), part.weight) for part in handle.parts])


@dataclass(slots=True, eq=False)
class _Load(Generic[_T]):
    """One load. started_s: None while it waits for its turn; is_settled: whether its outcome is known."""

    handle: AdapterHandle
    future: Future[_T] = field(default_factory=Future[Any])
    started_s: float | None = None
    is_slow: bool = False
    is_settled: bool = False


class Loads(Generic[_T]):
    """Loads each adapter once, however many ask for it at the same time. Safe for several threads."""

    def __init__(self, load: Callable[[AdapterHandle], _T], listener: LoadListener, *, timeout_s: float) -> None:
        self._load = load
        self._listener = listener
        self._timeout_s = timeout_s
        self._slow_s = min(_SLOW_S, timeout_s)
        self._changed = threading.Condition()
        self._loads: dict[str, _Load[_T]] = {}
        self._queue: deque[_Load[_T]] = deque()
        self._is_stopped = False
        self._watcher: threading.Thread | None = None

    def start(self, handle: AdapterHandle) -> Future[_T]:
        """Begin to load, unless that adapter is being loaded.

        The future fails with AdapterLoadError and cannot be cancelled, because others may wait for it too. Raises
        OverloadedError after `stop`.
        """
        with self._changed:
            if self._is_stopped:
                raise OverloadedError("The server is shutting down.", "Send the request again later.")
            load = self._loads.get(handle.digest)
            is_known = load is not None and load.is_settled
            if load is None:
                load = self._loads[handle.digest] = _Load(handle)
                load.future.set_running_or_notify_cancel()
                self._queue.append(load)
                self._begin()
        if is_known:
            self._listener.on_loaded(handle, load.future, load_s=self._timeout_s)
        return load.future

    def stop(self) -> None:
        """Start no further load; those that wait for their turn fail."""
        with self._changed:
            self._is_stopped = True
            waiting = list(self._queue)
            self._queue.clear()
            for load in waiting:
                del self._loads[load.handle.digest]
            self._changed.notify()
        for load in waiting:
            self._settle(load, OverloadedError("The server is shutting down.", "Ask another server, or again later."))

    def _begin(self) -> None:
        """Start the threads of loads whose turn it is; the caller holds the lock."""
        begun = [load for load in self._loads.values() if load.started_s is not None]
        num_turns = min(_NUM_TURNS - sum(not load.is_slow for load in begun), _MAX_THREADS - len(begun))
        for _ in range(min(num_turns, len(self._queue))):
            load = self._queue.popleft()
            load.started_s = time.monotonic()
            threading.Thread(target=self._run, args=(load,), name="adapter-load", daemon=True).start()
        if self._watcher is None:
            self._watcher = threading.Thread(target=self._watch, name="adapter-load-watch", daemon=True)
            self._watcher.start()
        self._changed.notify()

    def _run(self, load: _Load[_T]) -> None:
        try:
            outcome: _T | BaseException = self._load(load.handle)
        except BaseException as exc:  # One broken adapter must not end anything else; its requests hear of it.
            if not isinstance(exc, AdapterHubError):
                _log.exception("adapter %s cannot be loaded", load.handle.label)
            outcome = exc
        self._settle(load, outcome)
        with self._changed:  # Only now, so that nobody begins the same load while its outcome is on the way.
            del self._loads[load.handle.digest]
            self._begin()

    def _settle(self, load: _Load[_T], outcome: _T | BaseException) -> None:
        """Make an outcome known, unless the load timed out before."""
        with self._changed:
            if load.is_settled:
                return
            load.is_settled = True
        load_s = 0.0 if load.started_s is None else time.monotonic() - load.started_s
        if isinstance(outcome, BaseException):
            load.future.set_exception(_load_error(load.handle, outcome))
        else:
            load.future.set_result(outcome)
        self._listener.on_loaded(load.handle, load.future, load_s=load_s)

    def _watch(self) -> None:
        """Find loads that are slow or take too long, until all have ended after `stop`."""
        while True:
            with self._changed:
                if self._is_stopped and not self._loads:
                    return
                running_s = {
                    load: time.monotonic() - load.started_s
                    for load in self._loads.values()
                    if load.started_s is not None and not load.is_settled
                }
                late = [load for load, seconds in running_s.items() if seconds >= self._timeout_s]
                slow = [load for load, seconds in running_s.items() if not load.is_slow and seconds >= self._slow_s]
                for load in slow:
                    load.is_slow = True
                if slow or late:
                    self._begin()
                else:
                    left_s = (
                        (self._timeout_s if load.is_slow else self._slow_s) - seconds
                        for load, seconds in running_s.items()
                    )
                    self._changed.wait(min(left_s, default=None))
            for load in slow:
                self._listener.on_slow(load.handle)
            for load in late:
                self._settle(load, TimeoutError(f"it takes longer than {self._timeout_s:g} s"))


def _load_error(handle: AdapterHandle, exc: BaseException) -> AdapterLoadError:
    labels = " ".join(part.label for part in handle.parts)
    what, hint = str(exc), f"Check it with `hub adapters verify {labels}`, or choose another version."
    if isinstance(exc, OverloadedError):
        what, hint = exc.what, exc.hint
    error = AdapterLoadError(f"Adapter {handle.label!r} cannot be loaded: {what.rstrip('.')}.", hint)
    error.__cause__ = exc
    return error
