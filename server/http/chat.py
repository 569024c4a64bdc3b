"""`/v1/chat/completions`: messages in, an assistant's answer out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from fastapi import APIRouter, Request, Response

from adapterhub.base.prompts import chat_token_ids
from server.engine.types import TokenEvent, TokenLogprob, TokenScore
from server.http.generation import Answer, build_job, respond
from server.http.replies import (
    Chat,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    ChatReply,
    ChatScore,
    ChatTokenLogprob,
    Envelope,
    Usage,
)
from server.http.schema import ChatBody
from server.http.service import get_request_id, get_service

__all__ = ["ChatFormat", "router"]

router = APIRouter()


@router.post("/v1/chat/completions", response_model=Chat)
async def create_chat_completion(body: ChatBody, request: Request) -> Response:
    """Answer a conversation with the chosen adapter; `stream: true` sends server-sent events."""
    service = get_service(request)
    choice = await service.adapters.choose(body.adapter, body.model)
    messages = [message.rendered() for message in body.messages]
    prompt = await service.tokenize(lambda tokenizer: chat_token_ids(tokenizer, messages))
    job = build_job(service, body, request_id=get_request_id(request), choice=choice, prompts=[prompt])
    form = ChatFormat(has_logprobs=bool(body.logprobs))
    return await respond(service, job, form, is_stream=bool(body.stream), has_usage=body.has_usage_chunk)


class ChatFormat:
    """Writes chat completions and their chunks."""

    prefix = "chatcmpl"

    def __init__(self, *, has_logprobs: bool) -> None:
        self._has_logprobs = has_logprobs

    def whole(self, envelope: Envelope, answers: Sequence[Answer], usage: Usage) -> Chat:
        """Write all answers as one body."""
        choices = [
            ChatChoice(
                index=idx,
                message=ChatReply(content=answer.text),
                logprobs=_logprobs(answer.logprobs) if self._has_logprobs else None,
                finish_reason=answer.finish,
            )
            for idx, answer in enumerate(answers)
        ]
        return Chat(**_fields(envelope), choices=choices, usage=usage)

    def opening(self, envelope: Envelope, index: int) -> ChatChunk:
        """Write the role."""
        return _chunk(envelope, ChatChunkChoice(index=index, delta=ChatDelta(role="assistant", content="")))

    def piece(self, envelope: Envelope, index: int, event: TokenEvent) -> ChatChunk | None:
        """Write one token, if it has something to show."""
        if not event.text and event.logprob is None:
            return None
        logprobs = None if event.logprob is None else _logprobs([event.logprob])
        return _chunk(envelope, ChatChunkChoice(index=index, delta=ChatDelta(content=event.text), logprobs=logprobs))

    def closing(self, envelope: Envelope, index: int, finish: Literal["stop", "length"]) -> ChatChunk:
        """Write why the answer ended."""
        return _chunk(envelope, ChatChunkChoice(index=index, delta=ChatDelta(), finish_reason=finish))

    def usage(self, envelope: Envelope, usage: Usage) -> ChatChunk:
        """Write the token counts, without a choice."""
        return ChatChunk(**_fields(envelope), choices=[], usage=usage)


def _fields(envelope: Envelope) -> dict[str, Any]:
    return dict(envelope)


def _chunk(envelope: Envelope, choice: ChatChunkChoice) -> ChatChunk:
    return ChatChunk(**_fields(envelope), choices=[choice])


def _logprobs(logprobs: Sequence[TokenLogprob]) -> ChatLogprobs:
    content = [
        ChatTokenLogprob(**dict(_score(one.chosen)), top_logprobs=[_score(score) for score in one.top])
        for one in logprobs
    ]
    return ChatLogprobs(content=content)


def _score(score: TokenScore) -> ChatScore:
    return ChatScore(token=score.text, logprob=score.logprob, bytes=list(score.raw))
