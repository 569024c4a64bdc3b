"""Bodies of replies, in the shapes of the OpenAI API plus an `adapter` object.

Source of the shapes: https://platform.openai.com/docs/api-reference.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field, SerializerFunctionWrapHandler, model_serializer

__all__ = [
    "AdapterInfo",
    "Chat",
    "ChatChoice",
    "ChatChunk",
    "ChatChunkChoice",
    "ChatDelta",
    "ChatLogprobs",
    "ChatReply",
    "ChatScore",
    "ChatTokenLogprob",
    "Completion",
    "CompletionChoice",
    "CompletionLogprobs",
    "Envelope",
    "ErrorBody",
    "ErrorDetail",
    "MixMember",
    "ModelCard",
    "ModelList",
    "PromptDetails",
    "Usage",
]

Finish = Literal["stop", "length"]


class ErrorDetail(BaseModel):
    """What went wrong. code: stable name; param: the field at fault."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """Body of every error."""

    error: ErrorDetail


class MixMember(BaseModel):
    """One adapter of a mix and the factor on what it adds."""

    task: str
    version: int
    digest: str
    weight: float


class AdapterInfo(BaseModel):
    """Which adapter answered. task is `base`, and version and digest are null, for the bare base.

    members: only for a mix, whose task is `mix`, whose version is null and whose digest covers members and weights.
    """

    task: str
    version: int | None
    digest: str | None
    members: list[MixMember] | None = Field(default=None, exclude_if=lambda members: members is None)


class PromptDetails(BaseModel):
    """cached_tokens: tokens of the prompt that were computed before, for another request."""

    cached_tokens: int


class Usage(BaseModel):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class ChatScore(BaseModel):
    """One token and its log probability."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(ChatScore):
    """A chosen token and its alternatives."""

    top_logprobs: list[ChatScore]


class ChatLogprobs(BaseModel):
    """Log probabilities of an answer or a piece of it."""

    content: list[ChatTokenLogprob]
    refusal: None = None


class ChatReply(BaseModel):
    """A whole answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One answer of a chat completion."""

    index: int
    message: ChatReply
    logprobs: ChatLogprobs | None
    finish_reason: Finish


class Envelope(BaseModel):
    """What every reply and chunk begins with. model: the version that answers, or the base."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    adapter: AdapterInfo


class Chat(Envelope):
    """Reply of `/v1/chat/completions`."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(BaseModel):
    """What a chunk adds."""

    role: Literal["assistant"] | None = None
    content: str | None = None

    @model_serializer(mode="wrap")
    def _without_nulls(self, handler: SerializerFunctionWrapHandler) -> dict[str, str]:
        return {key: value for key, value in handler(self).items() if value is not None}


class ChatChunkChoice(BaseModel):
    """One answer's part of a chunk."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: Finish | None = None


class ChatChunk(Envelope):
    """One event of a chat stream."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class CompletionLogprobs(BaseModel):
    """Log probabilities in the older form: parallel lists. text_offset counts characters of the answer.

    tokens: text, or `bytes:` and escaped bytes for a part of a character.
    """

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One answer of a completion, or a piece of it in a stream."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Finish | None = None


class Completion(Envelope):
    """Reply of `/v1/completions`, and each event of its stream."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    """One name a request may use. root and parent: the base; aliases: names that point to this version now."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "adapterhub"
    root: str
    parent: str | None = None
    digest: str | None = None
    aliases: list[str] = []


class ModelList(BaseModel):
    """Reply of `/v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
