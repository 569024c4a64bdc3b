"""An engine without a model: it answers with the adapter's label and the prompt.

Deterministic, for tests of the layers above. Keeps the promises of `Engine`: one terminal event, cancellation, stop
strings, bounded admission.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Collection

from adapterhub.errors import AdapterHubError, AdapterLoadError, ContextTooLongError, OverloadedError, RequestError
from adapterhub.records import EffectReport
from server.engine.detokenize import Detokenizer, StopFilter, Tokenizer, TokenTexts
from server.engine.types import (
    AdapterHandle,
    EngineStatus,
    ErrorEvent,
    Event,
    FinishEvent,
    GenerateRequest,
    Tier,
    TokenEvent,
    TokenLogprob,
    TokenScore,
)

__all__ = ["FakeEngine"]


class FakeEngine:
    """Answers `[label] prompt`, one token at a time.

    encode: text to tokens; step_s: pause before each token; fail_after: break each request after so many tokens;
    broken: digests that cannot be loaded; max_requests: more at a time are refused.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        encode: Callable[[str], list[int]],
        *,
        context_tokens: int = 512,
        step_s: float = 0.0,
        fail_after: int | None = None,
        broken: Collection[str] = (),
        max_requests: int = 64,
    ) -> None:
        self._tokenizer = tokenizer
        self._encode = encode
        self._texts = TokenTexts(tokenizer)
        self._context_tokens = context_tokens
        self._step_s = step_s
        self._fail_after = fail_after
        self._broken = broken
        self._max_requests = max_requests
        self._loaded: dict[str, AdapterHandle] = {}
        self._is_running = False
        self.running: set[str] = set()
        self.cancelled: list[str] = []

    @property
    def context_tokens(self) -> int:
        """Longest prompt plus answer of one request."""
        return self._context_tokens

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """Yield the tokens of `[label] prompt`, then one terminal event."""
        if not request.prompt_token_ids:
            raise RequestError(f"Request {request.request_id!r} has a prompt of 0 tokens.", "Send at least one.")
        num_tokens = len(request.prompt_token_ids) + request.sampling.max_tokens
        if num_tokens > self._context_tokens:
            raise ContextTooLongError(
                f"Request {request.request_id!r} needs {num_tokens} tokens; the context has {self._context_tokens}.",
                "Shorten the prompt or ask for fewer tokens.",
            )
        if not self._is_running or len(self.running) >= self._max_requests:
            raise OverloadedError(f"All {self._max_requests} places are taken.", "Try again later.")
        self.running.add(request.request_id)
        is_complete = False
        try:
            async for event in self._events(request):
                is_complete = not isinstance(event, TokenEvent)
                yield event
        finally:
            self.running.discard(request.request_id)
            if not is_complete:
                self.cancelled.append(request.request_id)

    async def _events(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        if request.adapter is not None:
            try:
                await self.load(request.adapter)
            except AdapterLoadError as error:
                yield ErrorEvent(error)
                return
        label = request.adapter.label if request.adapter else "base"
        prompt = self._tokenizer.decode(request.prompt_token_ids, skip_special_tokens=True)
        answer = self._encode(f"[{label}] {prompt}")
        detokenizer, stop = Detokenizer(self._tokenizer), StopFilter(request.sampling.stop)
        max_tokens = request.sampling.max_tokens
        for count, token_id in enumerate(answer[:max_tokens], start=1):
            await asyncio.sleep(self._step_s)
            if not self._is_running:
                yield ErrorEvent(OverloadedError("The server is shutting down.", "Send the request again later."))
                return
            if self._fail_after is not None and count > self._fail_after:
                yield ErrorEvent(AdapterHubError(f"The engine broke after {count - 1} tokens.", "Send it again."))
                return
            offset = detokenizer.num_characters
            text = stop.add(detokenizer.add(token_id))
            is_last = stop.is_stopped or count == min(len(answer), max_tokens)
            if is_last and not stop.is_stopped:
                text += stop.add(detokenizer.flush()) + stop.flush()
            yield TokenEvent(text, token_id, self._logprob(request, token_id), offset)
            if is_last:
                reason = "length" if count == max_tokens < len(answer) and not stop.is_stopped else "stop"
                yield FinishEvent(reason, len(request.prompt_token_ids), count)
                return

    def _logprob(self, request: GenerateRequest, token_id: int) -> TokenLogprob | None:
        if request.sampling.logprobs is None:
            return None
        score = TokenScore(token_id, self._texts.text(token_id), self._texts.raw(token_id), -0.5)
        return TokenLogprob(score, (score,) * min(1, request.sampling.logprobs))

    async def load(self, handle: AdapterHandle) -> None:
        """Remember the adapter. Raises AdapterLoadError for the broken ones."""
        if handle.digest in self._broken:
            raise AdapterLoadError(f"Adapter {handle.label!r} cannot be loaded: it is broken.", "Publish it again.")
        self._loaded[handle.digest] = handle

    async def unload(self, digest: str) -> bool:
        """Forget the adapter; nothing else uses it."""
        self._loaded.pop(digest, None)
        return True

    async def measure(self, handle: AdapterHandle) -> EffectReport | None:
        """Remember the adapter; there is nothing to measure."""
        await self.load(handle)

    async def start(self) -> None:
        """Begin to accept requests."""
        self._is_running = True

    async def stop(self) -> None:
        """Stop accepting requests; those in flight end with an ErrorEvent at their next token."""
        self._is_running = False

    def resident(self) -> list[str]:
        """Digests that were loaded."""
        return list(self._loaded)

    def residency(self) -> dict[str, Tier]:
        """Everything that was loaded is on the device."""
        return dict.fromkeys(self._loaded, "device")

    def status(self) -> EngineStatus:
        """Say how busy the engine is."""
        return EngineStatus(is_ready=self._is_running, num_running=len(self.running), num_waiting=0, retry_after_s=1)
