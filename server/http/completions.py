"""`/v1/completions`: text or token ids in, their continuation out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from fastapi import APIRouter, Request, Response

from adapterhub.base.prompts import text_token_ids
from adapterhub.errors import RequestError
from server.engine.types import TokenEvent, TokenLogprob, TokenScore
from server.http.generation import Answer, build_job, respond
from server.http.replies import Completion, CompletionChoice, CompletionLogprobs, Envelope, Usage
from server.http.schema import CompletionBody
from server.http.service import get_request_id, get_service

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CompletionFormat", "router"]

router = APIRouter()


@router.post("/v1/completions", response_model=Completion)
async def create_completion(body: CompletionBody, request: Request) -> Response:
    """Continue one or several prompts with the chosen adapter; `stream: true` sends server-sent events."""
    service = get_service(request)
    choice = await service.adapters.choose(body.adapter, body.model)
    prompts = await service.tokenize(lambda tokenizer: [_token_ids(tokenizer, prompt) for prompt in body.prompts])
    job = build_job(service, body, request_id=get_request_id(request), choice=choice, prompts=prompts)
    form = CompletionFormat(has_logprobs=body.logprobs is not None)
    return await respond(service, job, form, is_stream=bool(body.stream), has_usage=body.has_usage_chunk)


def _token_ids(tokenizer: PreTrainedTokenizerBase, prompt: str | list[int]) -> list[int]:
    if isinstance(prompt, str):
        return text_token_ids(tokenizer, prompt)
    size = len(tokenizer)
    if max(prompt) >= size:
        raise RequestError(f"Token id {max(prompt)} is not in the vocabulary.", f"Send ids from 0 to {size - 1}.").at(
            "prompt"
        )
    return prompt


class CompletionFormat:
    """Writes completions; chunks of a stream have the same shape."""

    prefix = "cmpl"

    def __init__(self, *, has_logprobs: bool) -> None:
        self._has_logprobs = has_logprobs

    def whole(self, envelope: Envelope, answers: Sequence[Answer], usage: Usage) -> Completion:
        """Write all answers as one body."""
        choices = [
            CompletionChoice(
                index=idx,
                text=answer.text,
                logprobs=_logprobs(answer.logprobs, answer.offsets) if self._has_logprobs else None,
                finish_reason=answer.finish,
            )
            for idx, answer in enumerate(answers)
        ]
        return Completion(**_fields(envelope), choices=choices, usage=usage)

    def opening(self, envelope: Envelope, index: int) -> None:  # noqa: ARG002
        """Write nothing: there is no role."""
        return

    def piece(self, envelope: Envelope, index: int, event: TokenEvent) -> Completion | None:
        """Write one token, if it has something to show."""
        if not event.text and event.logprob is None:
            return None
        logprobs = None if event.logprob is None else _logprobs([event.logprob], [event.offset])
        choice = CompletionChoice(index=index, text=event.text, logprobs=logprobs)
        return Completion(**_fields(envelope), choices=[choice])

    def closing(self, envelope: Envelope, index: int, finish: Literal["stop", "length"]) -> Completion:
        """Write why the answer ended."""
        choice = CompletionChoice(index=index, text="", finish_reason=finish)
        return Completion(**_fields(envelope), choices=[choice])

    def usage(self, envelope: Envelope, usage: Usage) -> Completion:
        """Write the token counts, without a choice."""
        return Completion(**_fields(envelope), choices=[], usage=usage)


def _logprobs(logprobs: Sequence[TokenLogprob], offsets: Sequence[int]) -> CompletionLogprobs:
    return CompletionLogprobs(
        tokens=[_key(one.chosen) for one in logprobs],
        token_logprobs=[one.chosen.logprob for one in logprobs],
        top_logprobs=[_top(one.top) for one in logprobs],
        text_offset=list(offsets),
    )


def _top(scores: Sequence[TokenScore]) -> dict[str, float]:
    """Write alternatives, best first; of those that look alike the best one stays."""
    top: dict[str, float] = {}
    for score in scores:
        top.setdefault(_key(score), score.logprob)
    return top


def _key(score: TokenScore) -> str:
    """Name a token by its text; parts of characters, which would look alike as text, by their bytes as OpenAI does."""
    try:
        return score.raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in score.raw)


def _fields(envelope: Envelope) -> dict[str, Any]:
    return dict(envelope)
