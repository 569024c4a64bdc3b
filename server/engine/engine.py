"""The engine of this project: a step loop in a thread, behind the asynchronous interface of `Engine`.

Knows requests and events, and admits no more than the queue holds. The loop decides and runs.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncGenerator
from concurrent.futures import Future
from functools import partial
from typing import Any

from adapterhub.base.identity import Base
from adapterhub.base.prompts import stop_token_ids
from adapterhub.errors import AdapterLoadError, ContextTooLongError, OverloadedError, RequestError
from adapterhub.records import EffectReport
from server.engine.detokenize import TokenTexts
from server.engine.grammar import Grammars
from server.engine.host import Loads, load_parts
from server.engine.sampling import Sampler
from server.engine.sequence import Limits
from server.engine.step_loop import StepLoop, StepRunner
from server.engine.track import Track
from server.engine.types import AdapterHandle, EngineStatus, Event, GenerateRequest, Tier, TokenEvent

__all__ = ["NativeEngine"]

# A step lets go of the interpreter some 300 times. With Python's 5 milliseconds it may get it back that much later each
# time while an adapter loads or answers are sent.
_SWITCH_INTERVAL_S = 0.0002


class NativeEngine:
    """Generates with a `Runner`. tokenizer: the base's, not shared with other threads."""

    def __init__(self, runner: StepRunner, tokenizer: Any, base: Base, *, limits: Limits | None = None) -> None:
        self._runner = runner
        self._tokenizer = tokenizer
        self._base = base
        self._limits = limits or Limits()
        self._texts = TokenTexts(tokenizer)
        self._stop_ids = frozenset(stop_token_ids(tokenizer))
        self._grammars = Grammars(tokenizer, sorted(self._stop_ids), num_tokens=self._texts.num_tokens)
        self._loads: Loads[Any] = Loads(
            partial(load_parts, runner), listener=self, timeout_s=self._limits.load_timeout_s
        )
        self._open: set[Track] = set()
        self._loop: StepLoop | None = None
        self._thread: threading.Thread | None = None
        self._is_stopped = False

    @property
    def context_tokens(self) -> int:
        """Longest prompt plus answer of one request: what the base knows and the key-value memory holds."""
        return min(self._base.context_tokens, self._runner.num_blocks * self._runner.block_size)

    @property
    def num_steps(self) -> int:
        """Steps run so far."""
        return 0 if self._loop is None else self._loop.num_steps

    async def start(self) -> None:
        """Start the step thread; a second call does nothing."""
        if self._thread is not None:
            return
        sys.setswitchinterval(min(sys.getswitchinterval(), _SWITCH_INTERVAL_S))
        self._loop = StepLoop(
            self._runner,
            Sampler(self._texts),
            limits=self._limits,
            base_digest=self._base.digest,
            request_load=self._loads.start,
            loop=asyncio.get_running_loop(),
        )
        self._thread = threading.Thread(target=self._loop.run, name="steps", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """End every request in flight with an ErrorEvent and wait for the thread; a second call does nothing."""
        if self._loop is None or self._thread is None:
            return
        self._is_stopped = True
        self._loop.stop()
        await asyncio.to_thread(self._thread.join)
        self._loads.stop()

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """Yield token events and then exactly one terminal event; closing the generator cancels the request.

        Raises OverloadedError when the queue is full or the engine is not running, ContextTooLongError, and
        RequestError for an empty prompt, tokens the model does not know or an output rule that cannot be used.
        """
        matcher = await self._grammars.matcher(request.sampling.output)
        loop = self._admit(request)
        track = Track(request, self._tokenizer, self._stop_ids, matcher=matcher)
        self._open.add(track)
        is_finished = False
        try:
            loop.put(track)
            while not is_finished:
                event = await track.events.get()
                is_finished = not isinstance(event, TokenEvent)
                yield event
        finally:
            self._open.discard(track)
            if not is_finished:
                loop.cancel(track)

    def _admit(self, request: GenerateRequest) -> StepLoop:
        if not request.prompt_token_ids:
            raise RequestError(f"Request {request.request_id!r} has a prompt of 0 tokens.", "Send at least one.")
        num_tokens = len(request.prompt_token_ids) + request.sampling.max_tokens
        if num_tokens > self.context_tokens:
            raise ContextTooLongError(
                f"Request {request.request_id!r} needs {num_tokens} tokens; the context has {self.context_tokens}.",
                "Shorten the prompt or ask for fewer tokens.",
            )
        largest, size = max(request.prompt_token_ids, default=0), self._runner.vocab_size
        if largest >= size:
            raise RequestError(
                f"Token id {largest} is not in the vocabulary of {self._base.name!r}, which has {size}.",
                f"Send ids from 0 to {size - 1}.",
            )
        if self._loop is None or not self.status().is_ready:
            raise OverloadedError("The engine is not running.", "Send the request again later.")
        self._check_queue(request.tenant)
        return self._loop

    def _check_queue(self, tenant: str) -> None:
        """Refuse when the queue is full, but for a tenant that has less than an equal share of its places."""
        limits = self._limits
        waiting = [track.request for track in self._open if not track.sequence.block_ids]
        num_tokens = sum(len(one.prompt_token_ids) for one in waiting)
        if len(waiting) < limits.max_waiting and num_tokens < limits.max_waiting_tokens:
            return
        own = [one for one in waiting if one.tenant == tenant]
        num_own_tokens = sum(len(one.prompt_token_ids) for one in own)
        num_tenants = len({tenant, *(one.tenant for one in waiting)})
        has_place = len(own) * num_tenants < limits.max_waiting
        if has_place and num_own_tokens * num_tenants < limits.max_waiting_tokens:
            return
        raise OverloadedError(
            f"The queue is full: {len(waiting)} requests with {num_tokens} prompt tokens wait; "
            f"at most {limits.max_waiting} requests and {limits.max_waiting_tokens} tokens may.",
            f"Send the request again in {self.status().retry_after_s} s.",
        )

    def on_loaded(self, handle: AdapterHandle, outcome: Future[Any], *, load_s: float) -> None:
        """Pass the outcome of a load on to the step thread."""
        assert self._loop is not None
        error = outcome.exception()
        if isinstance(error, AdapterLoadError):
            self._loop.put_loaded(handle, None, error, load_s=load_s)
        else:
            self._loop.put_loaded(handle, outcome.result(), None, load_s=load_s)

    def on_slow(self, handle: AdapterHandle) -> None:
        """Pass on that a load takes long."""
        assert self._loop is not None
        self._loop.put_slow(handle)

    async def load(self, handle: AdapterHandle) -> None:
        """Load an adapter, and write it into a slot at once if one has no user.

        Raises AdapterLoadError, and OverloadedError when the engine is not running.
        """
        await self._bring(handle)

    async def measure(self, handle: AdapterHandle) -> EffectReport | None:
        """Load an adapter and say how much it changes the base; None for a mix. Raises what `load` raises."""
        adapter = await self._bring(handle)
        return None if adapter.measure is None else await asyncio.to_thread(adapter.measure)

    async def _bring(self, handle: AdapterHandle) -> Any:
        if self._loop is None or not self.status().is_ready:
            raise OverloadedError("The engine is not running.", "Start it first.")
        adapter = self._loop.find_adapter(handle.digest)
        return adapter if adapter is not None else await asyncio.wrap_future(self._loads.start(handle))

    async def unload(self, digest: str) -> bool:
        """Forget an adapter on the device and on the host, unless a request uses it. Return whether it is gone."""
        if self._loop is None or not self.status().is_ready:
            return digest not in self.residency()
        return await asyncio.wrap_future(self._loop.put_unload(digest))

    def resident(self) -> list[str]:
        """Digests that are on the device or on the host."""
        return list(self.residency())

    def residency(self) -> dict[str, Tier]:
        """Return the tier of each resident digest."""
        return {} if self._loop is None else self._loop.tiers()

    def check_integrity(self) -> None:
        """Check blocks and slots while nothing runs. Raises EngineStateError."""
        if self._loop is not None:
            self._loop.check_integrity()

    def status(self) -> EngineStatus:
        """Say how busy the engine is."""
        loop, thread = self._loop, self._thread
        if loop is None or thread is None:
            return EngineStatus(is_ready=False, num_running=0, num_waiting=0, retry_after_s=1)
        num_running = loop.num_running
        num_waiting = max(0, len(self._open) - num_running)
        return EngineStatus(
            is_ready=thread.is_alive() and not loop.is_stopping,
            is_alive=thread.is_alive() or self._is_stopped,
            num_running=num_running,
            num_waiting=num_waiting,
            retry_after_s=loop.retry_after_s(num_waiting),
            num_cached_prompt_tokens=loop.num_cached_tokens,
        )
