"""The loop that runs steps, in one thread: take messages, plan, write slots, run, record.

Slots are written here and only here, between steps. Knows sequences, tokens and loaded adapters; no HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, assert_never

import torch
from torch import Tensor

from adapterhub.errors import AdapterHubError, AdapterLoadError, OverloadedError
from server.engine.blocks import BlockPool
from server.engine.host import AdapterLoader
from server.engine.isolation import run_isolated
from server.engine.residency import Residency, SlotWriter
from server.engine.runner import StepRow
from server.engine.sampling import Sampled, Sampler
from server.engine.scheduler import Scheduler
from server.engine.sequence import Limits, Row, StepPlan
from server.engine.sequence import Sequence as SequenceState
from server.engine.track import Track
from server.engine.types import AdapterHandle, ErrorEvent, Event, Tier, TokenEvent

__all__ = ["StepLoop", "StepRunner"]

_log = logging.getLogger(__name__)
# Weight of the newest request in the mean duration: the mean follows a change of load within some tens of requests.
_NEWEST_WEIGHT = 0.1
_MAX_RETRY_AFTER_S = 60


class StepRunner(AdapterLoader, SlotWriter, Protocol):
    """What the loop needs of `server.engine.runner.Runner`; adapters are loaded in other threads."""

    block_size: int
    vocab_size: int

    @property
    def num_blocks(self) -> int:
        """Blocks for keys and values."""
        ...

    def step(self, rows: Sequence[StepRow], *, epoch: int) -> Tensor:
        """Run the rows; return the logits of each row's last token, (len(rows), V) float32."""
        ...


@dataclass(frozen=True, slots=True)
class _Loaded:
    """The outcome of a load: an adapter or the reason why there is none."""

    handle: AdapterHandle
    adapter: Any
    error: AdapterLoadError | None
    load_s: float


@dataclass(frozen=True, slots=True)
class _SlowLoad:
    handle: AdapterHandle


@dataclass(frozen=True, slots=True)
class _Unload:
    digest: str
    is_gone: Future[bool]


@dataclass(frozen=True, slots=True)
class _Cancel:
    track: Track


_Message = Track | _Loaded | _SlowLoad | _Unload | _Cancel


class StepLoop:
    """Owns the scheduler, the adapters, the blocks and every request in flight.

    base_digest: what keys and values depend on besides the adapter. request_load: asks for an adapter that is neither
    on the host nor on the device; the answer comes by `put_loaded`.
    """

    def __init__(
        self,
        runner: StepRunner,
        sampler: Sampler,
        *,
        limits: Limits,
        base_digest: str,
        request_load: Callable[[AdapterHandle], object],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._runner = runner
        self._sampler = sampler
        self._limits = limits
        self._request_load = request_load
        self._loop = loop
        self._residency = Residency(runner, host_bytes=limits.host_adapter_mib << 20)
        blocks = BlockPool(runner.num_blocks, block_size=runner.block_size)
        self._scheduler = Scheduler(self._residency.slots, blocks, limits, base_digest=base_digest)
        self._tracks: dict[SequenceState, Track] = {}
        self._requested: set[str] = set()
        self._inbox: deque[_Message] = deque()
        self._wake = threading.Condition()
        self.is_stopping = False
        self._has_rows = False
        self._mean_duration_s = 1.0
        self.num_steps = 0

    # What other threads may call.

    def put(self, track: Track) -> None:
        """Hand over a new request. After the end it fails at once."""
        if not self._send(track):
            self._emit([(track, ErrorEvent(_stopping()))])

    def cancel(self, track: Track) -> None:
        """End a request whose caller is gone; it gets no further event."""
        self._send(_Cancel(track))

    def put_loaded(self, handle: AdapterHandle, adapter: Any, error: AdapterLoadError | None, *, load_s: float) -> None:
        """Hand over the outcome of a load. load_s: what it took."""
        self._send(_Loaded(handle, adapter, error, load_s))

    def put_unload(self, digest: str) -> Future[bool]:
        """Ask to forget an adapter that no request uses; the future tells whether it is gone."""
        message = _Unload(digest, Future())
        message.is_gone.set_running_or_notify_cancel()  # Who asks may leave; the answer is set all the same.
        if not self._send(message):
            message.is_gone.set_result(False)
        return message.is_gone

    def put_slow(self, handle: AdapterHandle) -> None:
        """Say that a load takes long, so that others are asked for in its stead."""
        self._send(_SlowLoad(handle))

    def _send(self, message: _Message) -> bool:
        with self._wake:
            if not self.is_stopping:
                self._inbox.append(message)
                self._wake.notify()
            return not self.is_stopping

    def stop(self) -> None:
        """End after the step that runs now; requests in flight fail."""
        with self._wake:
            self.is_stopping = True
            self._wake.notify()

    def tiers(self) -> dict[str, Tier]:
        """Return where each adapter is that is on the device or on the host."""
        return self._residency.tiers()

    def find_adapter(self, digest: str) -> Any:
        """Return an adapter that is on the host or on the device, or None."""
        return self._residency.loaded.get(digest)

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that were taken from the prefix cache."""
        return self._scheduler.num_cached_tokens

    @property
    def num_running(self) -> int:
        """Requests that take part in steps."""
        return self._scheduler.num_running

    def retry_after_s(self, num_waiting: int) -> int:
        """Say when a place is likely to be free, from the mean duration of requests."""
        rounds = (num_waiting + 1) / self._limits.max_sequences
        return min(_MAX_RETRY_AFTER_S, 1 + int(rounds * self._mean_duration_s))

    def check_integrity(self) -> None:
        """Check that blocks and slots are used exactly as the sequences say. Raises EngineStateError."""
        self._scheduler.check_integrity()

    # The thread.

    def run(self) -> None:
        """Run steps until stopped; then every request that is left fails."""
        error: AdapterHubError = _stopping()
        try:
            while self._take_messages():
                plan = self._scheduler.schedule(loaded=self._residency.loaded, slow=self._residency.slow)
                self._has_rows = bool(plan.rows)
                for digest in plan.missing:
                    if digest not in self._requested:  # Its outcome may be on the way.
                        self._requested.add(digest)
                        self._request_load(self._handle_of(digest))
                if self._write_slots(plan) and plan.rows:
                    self._run_rows(plan.rows, epoch=plan.epoch)
        except BaseException as exc:  # A panic in Rust too: the thread ends, and nobody may be left waiting.
            _log.exception("the engine stopped after %d steps", self.num_steps)
            error = AdapterHubError(f"The engine stopped: {_reason(exc)}", "Restart the server and report its log.")
        with self._wake:
            self.is_stopping = True
            left, self._inbox = self._inbox, deque()
        self._tracks |= {message.sequence: message for message in left if isinstance(message, Track)}
        for message in left:
            if isinstance(message, _Unload):
                message.is_gone.set_result(False)
        self._emit([(track, ErrorEvent(error)) for track in self._tracks.values()])

    def _take_messages(self) -> bool:
        """Handle what came in; wait for something when there is nothing to run. False when it is time to stop."""
        if not self._tracks:
            self.check_integrity()
        with self._wake:
            while not (self._inbox or self._has_rows or self.is_stopping):
                self._wake.wait()
            num_messages = len(self._inbox)
            if self.is_stopping:
                return False
        for _ in range(num_messages):
            self._handle(self._inbox[0])
            self._inbox.popleft()  # Only now: should handling it fail, its sender hears of that at the end.
        return True

    def _handle(self, message: _Message) -> None:
        match message:
            case Track():
                self._tracks[message.sequence] = message
                self._scheduler.add(message.sequence)
            case _Loaded():
                self._requested.discard(message.handle.digest)
                self._residency.slow.discard(message.handle.digest)
                if message.error is None:
                    self._keep(message)
                else:
                    self._fail(self._scheduler.waiting_for(message.handle.digest), message.error)
            case _SlowLoad():
                self._residency.slow.add(message.handle.digest)
            case _Unload():
                is_wanted = bool(self._scheduler.waiting_for(message.digest))
                message.is_gone.set_result(not is_wanted and self._residency.unload(message.digest))
            case _Cancel():
                if self._tracks.pop(message.track.sequence, None) is not None:
                    self._scheduler.finish(message.track.sequence)
            case _:
                assert_never(message)

    def _keep(self, loaded: _Loaded) -> None:
        """Keep a loaded adapter on the host; put it into a slot at once if nobody waits for it and one has no user."""
        digest, wanted = loaded.handle.digest, self._scheduler.wanted
        if digest not in self._residency.loaded:
            self._residency.keep(digest, loaded.adapter, load_s=loaded.load_s, wanted={*wanted, digest})
            if not self._scheduler.waiting_for(digest):
                self._residency.write_ahead(digest, wanted=wanted)

    def _write_slots(self, plan: StepPlan) -> bool:
        """Write every slot of a plan. An adapter that fails ends its own requests, and the step is planned again."""
        is_written = True
        for slot, digest in plan.writes:
            error = self._residency.write(slot, digest)
            if error is not None:
                is_written = False
                self._fail(self._scheduler.sequences_of(digest), error)
                self._residency.empty(slot)
        if plan.writes:
            self._residency.trim(self._scheduler.wanted)
        return is_written

    def _run_rows(self, rows: Sequence[Row], *, epoch: int) -> None:
        """Run one step and record what it gave; rows that cannot run end their own requests."""

        def run(some: Sequence[Row]) -> Tensor:
            return self._runner.step([_step_row(row) for row in some], epoch=epoch)

        sampled: list[Row] = []
        logits: list[Tensor] = []
        for some, outcome in run_isolated(run, rows):
            if isinstance(outcome, Exception):
                what = f"The step failed: {_reason(outcome)}"
                hint = "Send the request again; report the server's log."
                self._fail([row.sequence for row in some], AdapterHubError(what, hint))
                continue
            for row in some:
                if not row.is_sampled:
                    self._scheduler.advance(row, None)
            ends = [idx for idx, row in enumerate(some) if row.is_sampled]
            sampled += [some[idx] for idx in ends]
            logits.append(outcome if len(ends) == len(some) else outcome[ends])
        self.num_steps += bool(logits)
        if sampled:
            self._sample(sampled, logits[0] if len(logits) == 1 else torch.cat(logits))

    def _sample(self, rows: Sequence[Row], logits: Tensor) -> None:
        """Draw and record the new token of each row, logits (len(rows), V) float32."""
        tracks = [self._tracks[row.sequence] for row in rows]
        results: Sequence[Sampled | AdapterHubError]
        try:
            results = self._sampler.sample(logits, [track.draw for track in tracks])
        except Exception as exc:  # These requests end here, not the loop.
            _log.exception("step %d gave values that cannot be drawn from", self.num_steps)
            results = [_cannot_continue(track, exc) for track in tracks]
        events: list[tuple[Track, Event]] = []
        for row, track, result in zip(rows, tracks, results, strict=True):
            events += [(track, event) for event in self._record(row, track, result)]
        self._emit(events)

    def _record(self, row: Row, track: Track, result: Sampled | AdapterHubError) -> list[Event]:
        """Record the new token of one row; a row that has none, or whose text fails, ends its own request."""
        events: list[Event]
        if isinstance(result, AdapterHubError):
            events = [ErrorEvent(result)]
        else:
            try:
                self._scheduler.advance(row, result.token_id)
                events = track.accept(result.token_id, result.logprob)
            except Exception as exc:  # The request ends here; the other rows of the step are fine.
                _log.exception("request %s failed after its step", track.request.request_id)
                events = [ErrorEvent(_cannot_continue(track, exc))]
        if not isinstance(events[-1], TokenEvent):
            self._scheduler.finish(track.sequence)
            del self._tracks[track.sequence]
            duration_s = time.monotonic() - track.started_s
            self._mean_duration_s += _NEWEST_WEIGHT * (duration_s - self._mean_duration_s)
        return events

    def _fail(self, sequences: Sequence[SequenceState], error: AdapterHubError) -> None:
        """End requests with an error."""
        events: list[tuple[Track, Event]] = []
        for sequence in sequences:
            self._scheduler.finish(sequence)
            events.append((self._tracks.pop(sequence), ErrorEvent(error)))
        self._emit(events)

    def _emit(self, events: Sequence[tuple[Track, Event]]) -> None:
        """Hand events to the event loop, all of a step at once."""

        def deliver() -> None:
            for track, event in events:
                track.events.put_nowait(event)

        if events:
            with suppress(RuntimeError):  # The event loop is closed: nobody listens any more.
                self._loop.call_soon_threadsafe(deliver)

    def _handle_of(self, digest: str) -> AdapterHandle:
        track = self._tracks[self._scheduler.waiting_for(digest)[0]]
        assert track.request.adapter is not None
        return track.request.adapter


def _step_row(row: Row) -> StepRow:
    slot = row.sequence.slot
    assert slot is not None
    return StepRow(row.token_ids, row.start, tuple(row.sequence.block_ids), slot)


def _reason(exc: BaseException) -> str:
    return str(exc).rstrip(".") + "."


def _stopping() -> OverloadedError:
    return OverloadedError("The server is shutting down.", "Send the request again later.")


def _cannot_continue(track: Track, exc: Exception) -> AdapterHubError:
    what = f"The answer to request {track.request.request_id!r} cannot be continued: {_reason(exc)}"
    return AdapterHubError(what, "Report the request with the server's log.")
