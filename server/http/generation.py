"""From a checked body to a response: admit, generate, reply. The same for chat and plain completions.

Knows the engine's events; a `Format` knows how they look on the wire.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Literal, Protocol

from fastapi import Response
from pydantic import BaseModel

from adapterhub.errors import AdapterHubError, ContextTooLongError, OverloadedError, RequestError
from server.engine.types import ErrorEvent, FinishEvent, GenerateRequest, TokenEvent, TokenLogprob
from server.http.adapters import AdapterChoice
from server.http.errors import error_body
from server.http.replies import Envelope, PromptDetails, Usage
from server.http.schema import GenerationBody
from server.http.service import Service
from server.http.stream import DONE, EventStream, merge_answers, sse

__all__ = ["Answer", "Format", "Job", "build_job", "respond"]

_log = logging.getLogger(__name__)
_MAX_ANSWERS = 128  # Of one request: prompts times choices.


@dataclass(slots=True)
class Answer:
    """One answer as far as it has come. offsets: where each token of `logprobs` begins, in characters."""

    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list[TokenLogprob])
    offsets: list[int] = field(default_factory=list[int])
    finish: Literal["stop", "length"] = "stop"
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    num_cached_tokens: int = 0


class Format(Protocol):
    """How one endpoint writes answers. A chunk of None is not sent."""

    prefix: str

    def whole(self, envelope: Envelope, answers: Sequence[Answer], usage: Usage) -> BaseModel:
        """Write all answers as one body."""
        ...

    def opening(self, envelope: Envelope, index: int) -> BaseModel | None:
        """Write what comes before the first token of an answer."""
        ...

    def piece(self, envelope: Envelope, index: int, event: TokenEvent) -> BaseModel | None:
        """Write one token."""
        ...

    def closing(self, envelope: Envelope, index: int, finish: Literal["stop", "length"]) -> BaseModel:
        """Write the end of one answer."""
        ...

    def usage(self, envelope: Envelope, usage: Usage) -> BaseModel:
        """Write the token counts of the whole request."""
        ...


@dataclass(frozen=True, slots=True)
class Job:
    """One admitted HTTP request: an answer per entry of `requests`, choices of one prompt side by side.

    output_field: which field asked for a form of the answer, for messages.
    """

    request_id: str
    created: int
    choice: AdapterChoice
    requests: tuple[GenerateRequest, ...]
    num_choices: int
    output_field: str

    def located(self, error: AdapterHubError) -> AdapterHubError:
        """Name the field of this request that an engine's error is about, in the words of the client."""
        return error.at(self.output_field) if error.param == "output" else error

    def usage(self, answers: Sequence[Answer]) -> Usage:
        """Count tokens; a prompt counts once, however many answers it gets."""
        firsts = answers[:: self.num_choices]
        num_prompt = sum(answer.num_prompt_tokens for answer in firsts)
        num_completion = sum(answer.num_completion_tokens for answer in answers)
        return Usage(
            prompt_tokens=num_prompt,
            completion_tokens=num_completion,
            total_tokens=num_prompt + num_completion,
            prompt_tokens_details=PromptDetails(cached_tokens=sum(answer.num_cached_tokens for answer in firsts)),
        )


def build_job(
    service: Service,
    body: GenerationBody,
    *,
    request_id: str,
    choice: AdapterChoice,
    prompts: Sequence[Sequence[int]],
) -> Job:
    """Check lengths and write one engine request per answer. Raises RequestError and its kinds, and OverloadedError."""
    if service.is_draining:
        raise OverloadedError("The server is shutting down.", "Send the request to another server, or again later.")
    num_answers = len(prompts) * body.num_choices
    if num_answers > _MAX_ANSWERS:
        raise RequestError(
            f"{len(prompts)} prompts with 'n' {body.num_choices} ask for {num_answers} answers; "
            f"one request gives at most {_MAX_ANSWERS}.",
            "Send several requests.",
        ).at("n")
    lengths = [_answer_length(service, body, prompt) for prompt in prompts]
    requests = tuple(
        GenerateRequest(
            request_id=f"{request_id}-{prompt_idx}-{choice_idx}",
            prompt_token_ids=tuple(prompt),
            adapter=choice.handle,
            sampling=body.sampling(max_tokens, prompt_idx=prompt_idx, choice_idx=choice_idx),
            priority=body.priority or 0,
        )
        for prompt_idx, (prompt, max_tokens) in enumerate(zip(prompts, lengths, strict=True))
        for choice_idx in range(body.num_choices)
    )
    return Job(request_id, int(time.time()), choice, requests, body.num_choices, body.output_field)


def _answer_length(service: Service, body: GenerationBody, prompt: Sequence[int]) -> int:
    """Return the most tokens an answer may have, or say why there can be none."""
    limit, wanted, num_prompt = service.engine.context_tokens, body.wanted_tokens, len(prompt)
    if not prompt:
        raise RequestError("A prompt has no tokens.", "Send some text.").at("prompt")
    if wanted is not None and wanted > limit:
        raise RequestError(
            f"'max_tokens' is {wanted}; the context of {service.base.name!r} has {limit} tokens.",
            f"Ask for 1 to {max(1, limit - num_prompt)}.",
        ).at("max_tokens")
    room = limit - num_prompt
    if room < (wanted or 1):
        asked = "" if wanted is None else f" and 'max_tokens' asks for {wanted} more, together {num_prompt + wanted}"
        hint = f"Ask for at most {room}, or shorten the prompt." if room > 0 else "Shorten the prompt."
        raise ContextTooLongError(
            f"The prompt has {num_prompt} tokens{asked}; the context of {service.base.name!r} has {limit}.", hint
        ).at("messages" if hasattr(body, "messages") else "prompt")
    return wanted or min(room, body.default_tokens or room)


async def respond(service: Service, job: Job, form: Format, *, is_stream: bool, has_usage: bool) -> Response:
    """Generate and reply, as one body or as a stream."""
    envelope = Envelope(
        id=f"{form.prefix}-{job.request_id}",
        created=job.created,
        model=job.choice.label,
        system_fingerprint=f"fp_{service.base.digest[:12]}",
        adapter=job.choice.info,
    )
    if is_stream:
        chunks = _chunks(service, job, form, envelope, has_usage=has_usage)
        return EventStream(await anext(chunks), chunks, headers=job.choice.headers())
    answers = [Answer() for _ in job.requests]
    async with aclosing(_record(service, job, answers)) as events:
        async for _ in events:
            pass
    body = form.whole(envelope, answers, job.usage(answers))
    return Response(body.model_dump_json(), headers=job.choice.headers(), media_type="application/json")


async def _record(
    service: Service, job: Job, answers: list[Answer]
) -> AsyncGenerator[tuple[int, TokenEvent | FinishEvent], None]:
    """Write events into `answers` and pass them on. Raises the error of the first answer that fails."""
    started_s = time.monotonic()
    outcome = "cancelled"
    try:
        async with aclosing(merge_answers(service.engine, job.requests)) as events:
            async for idx, event in events:
                if isinstance(event, ErrorEvent):
                    outcome = event.error.code
                    raise job.located(event.error)
                _apply(answers[idx], event)
                yield idx, event
        outcome = "finished"
    finally:
        used = job.usage(answers)
        _log.info(
            "%s %s: adapter %s, %d prompt and %d answer tokens, %.3f s",
            job.request_id,
            outcome,
            job.choice.handle.digest if job.choice.handle else "base",
            used.prompt_tokens,
            used.completion_tokens,
            time.monotonic() - started_s,
        )


def _apply(answer: Answer, event: TokenEvent | FinishEvent) -> None:
    if isinstance(event, TokenEvent):
        answer.text += event.text
        if event.logprob is not None:
            answer.logprobs.append(event.logprob)
            answer.offsets.append(event.offset)
        return
    if event.reason == "cancelled":
        raise OverloadedError("The server cancelled the request.", "Send it again.")
    answer.finish = event.reason
    answer.num_prompt_tokens, answer.num_completion_tokens = event.num_prompt_tokens, event.num_completion_tokens
    answer.num_cached_tokens = event.num_cached_tokens


async def _chunks(
    service: Service, job: Job, form: Format, envelope: Envelope, *, has_usage: bool
) -> AsyncGenerator[bytes, None]:
    """Write events as server-sent events.

    An error before the first chunk is raised; a later one becomes the last event, and no `[DONE]` follows it.
    """
    answers = [Answer() for _ in job.requests]
    opened: set[int] = set()
    is_sent = False
    try:
        async with aclosing(_record(service, job, answers)) as events:
            async for idx, event in events:
                chunk = None
                if idx not in opened:
                    chunk = form.opening(envelope, idx)
                    opened.add(idx)
                if chunk is not None:
                    is_sent = True
                    yield sse(chunk)
                chunk = (
                    form.piece(envelope, idx, event)
                    if isinstance(event, TokenEvent)
                    else form.closing(envelope, idx, answers[idx].finish)
                )
                if chunk is not None:
                    is_sent = True
                    yield sse(chunk)
    except AdapterHubError as error:
        if not is_sent:
            raise
        yield sse(error_body(error))
        return
    if has_usage:
        yield sse(form.usage(envelope, job.usage(answers)))
    yield DONE
