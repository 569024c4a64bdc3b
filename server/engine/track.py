"""One request inside the engine: from sampled tokens to events. Knows text and stop conditions, no tensors."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Container

from server.engine.detokenize import Detokenizer, StopFilter, Tokenizer
from server.engine.grammar import Matcher
from server.engine.sampling import Draw
from server.engine.sequence import Sequence
from server.engine.types import Event, FinishEvent, FinishReason, GenerateRequest, TokenEvent, TokenLogprob

__all__ = ["Track"]


class Track:
    """What the engine keeps about one request. `events` belongs to the event loop, all else to the step thread."""

    def __init__(
        self,
        request: GenerateRequest,
        tokenizer: Tokenizer,
        stop_ids: Container[int],
        *,
        matcher: Matcher | None = None,
    ) -> None:
        self.request = request
        self.sequence = Sequence(
            request.request_id,
            None if request.adapter is None else request.adapter.digest,
            list(request.prompt_token_ids),
            tenant=request.tenant,
            priority=request.priority,
            max_tokens=len(request.prompt_token_ids) + request.sampling.max_tokens,
        )
        self.draw = Draw(
            request.sampling,
            prompt_token_ids=request.prompt_token_ids,
            matcher=matcher,
            model_name="the base" if request.adapter is None else f"adapter {request.adapter.label!r}",
        )
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.started_s = time.monotonic()
        self._stop_ids = () if request.sampling.ignore_eos else stop_ids
        self._detokenizer = Detokenizer(tokenizer)
        self._stop = StopFilter(request.sampling.stop)
        self._num_tokens = 0

    def accept(self, token_id: int, logprob: TokenLogprob | None) -> list[Event]:
        """Take the next token; return its event, and the end if it ends the answer."""
        self._num_tokens += 1
        is_end, offset = token_id in self._stop_ids, self._detokenizer.num_characters
        text = "" if is_end else self._continue(token_id)
        is_whole = is_end or self._stop.is_stopped or self.draw.is_complete
        is_last = is_whole or self._num_tokens == self.request.sampling.max_tokens
        if is_last:
            text += self._stop.add(self._detokenizer.flush()) + self._stop.flush()
        token = TokenEvent(text, token_id, None if is_end else logprob, offset)
        if not is_last:
            return [token]
        reason: FinishReason = "stop" if is_whole or self._stop.is_stopped else "length"
        num_prompt_tokens = len(self.request.prompt_token_ids)
        return [token, FinishEvent(reason, num_prompt_tokens, self._num_tokens, self.sequence.num_cached)]

    def _continue(self, token_id: int) -> str:
        """Record a token that does not end the answer, and return the text that is certain now."""
        self.draw.accept(token_id)
        return self._stop.add(self._detokenizer.add(token_id))
