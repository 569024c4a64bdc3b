"""Bodies of requests. A field we do not support is refused by name, unless its value asks for nothing.

Field names and limits follow the OpenAI API reference, https://platform.openai.com/docs/api-reference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal, Self, cast

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from adapterhub.errors import RequestError, UnsupportedFieldError, suggest
from server.engine.types import SamplingParams

__all__ = ["ChatBody", "ChatMessage", "CompletionBody", "GenerationBody", "StreamOptions", "TextPart"]

_MAX_CHOICES = 16
_MAX_STOP_STRINGS = 16
_MAX_LOGPROBS = 20  # OpenAI's limit for `top_logprobs`.
_MAX_PROMPTS = 64
_Neutral = Mapping[str, Sequence[JsonValue]]

# Fields of the OpenAI API without support here, and the values besides null that ask for nothing.
_NEUTRAL: _Neutral = {
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "logit_bias": ({},),
}
_NEUTRAL_CHAT: _Neutral = {
    **_NEUTRAL,
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "metadata": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_cache_key": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none",),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}
_NEUTRAL_COMPLETION: _Neutral = {**_NEUTRAL, "best_of": (1,), "echo": (False,), "suffix": ("",)}
_NEUTRAL_MESSAGE: _Neutral = {
    "name": (),
    "refusal": (),
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "tool_calls": ([],),
    "tool_call_id": (),
}


def _is_neutral(value: object, neutral: Sequence[JsonValue]) -> bool:
    return value is None or any(type(value) is type(one) and value == one for one in neutral)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


class _Body(BaseModel):
    """Refuses what is neither a field nor neutral, and removes what is neutral."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    neutral: ClassVar[_Neutral] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, raw: object) -> object:
        if not isinstance(raw, dict):
            return raw
        kept: dict[str, JsonValue] = {}
        for field, value in cast("dict[str, JsonValue]", raw).items():
            if field in cls.model_fields:
                kept[field] = value
            elif field not in cls.neutral:
                near = suggest(field, cls.model_fields, otherwise=f"Supported: {', '.join(sorted(cls.model_fields))}.")
                raise UnsupportedFieldError(f"Unknown field {field!r}.", near).at(field)
            elif not _is_neutral(value, cls.neutral[field]):
                allowed = " or ".join(repr(one) for one in [None, *cls.neutral[field]])
                raise UnsupportedFieldError(
                    f"Field {field!r} with the value {_shown(value)} is not supported by this server.",
                    f"Leave it out (or send {allowed}).",
                ).at(field)
        return kept


class TextPart(_Body):
    """One part of a message's content; text is the only kind."""

    type: Literal["text"]
    text: str


class ChatMessage(_Body):
    """One message. `developer` is OpenAI's newer word for `system`."""

    neutral: ClassVar[_Neutral] = _NEUTRAL_MESSAGE
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @model_validator(mode="before")
    @classmethod
    def _refuse_other_parts(cls, raw: object) -> object:
        content = cast("dict[str, JsonValue]", raw).get("content") if isinstance(raw, dict) else None
        for part in content if isinstance(content, list) else []:
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind != "text":
                raise UnsupportedFieldError(
                    f"A content part of type {kind!r} is not supported by this server.", "Send parts of type 'text'."
                ).at("messages")
        return cast("object", raw)

    def rendered(self) -> dict[str, str]:
        """What the chat template sees."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(_Body):
    """include_usage: send one more chunk with the token counts."""

    neutral: ClassVar[_Neutral] = {"include_obfuscation": (False,)}
    include_usage: bool | None = None


class GenerationBody(_Body):
    """What both endpoints have in common. default_tokens: answer length when none is asked for; None is what fits."""

    default_tokens: ClassVar[int | None] = None
    model: str | None = Field(None, description="The base, or an adapter for clients that cannot send `adapter`.")
    adapter: str | dict[str, JsonValue] | None = Field(
        None,
        description="task, task@v3, task@alias, task@sha256:<digest>, sha256:<digest> or base; or a weighted sum of "
        'several, {"mix": {name: weight}}.',
    )
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy; 1 by default, as OpenAI has it.")
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1, le=_MAX_CHOICES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | Annotated[list[str], Field(max_length=_MAX_STOP_STRINGS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Who asks; accepted for clients that send it, not used.")

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise RequestError("'stream_options' is set but 'stream' is not true.", "Set 'stream': true.").at(
                "stream_options"
            )
        if "" in self.stop_strings:
            raise RequestError("'stop' holds an empty string.", "Leave it out.").at("stop")
        return self

    @property
    def num_choices(self) -> int:
        """Answers per prompt."""
        return self.n or 1

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Stop strings as a tuple, whatever form they came in."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def has_usage_chunk(self) -> bool:
        """Whether the stream ends with a chunk of token counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def wanted_tokens(self) -> int | None:
        """Most tokens of one answer, if the caller says so."""
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives reported per token; None for no log probabilities."""
        return None

    def sampling(self, max_tokens: int, *, prompt_idx: int, choice_idx: int) -> SamplingParams:
        """How one answer is drawn. With a seed every answer has its own, which no other seed gives to any answer."""
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=None if self.seed is None else f"{self.seed}:{prompt_idx}:{choice_idx}",
            stop=self.stop_strings,
            logprobs=self.num_logprobs,
        )


class ChatBody(GenerationBody):
    """Body of `/v1/chat/completions`."""

    neutral: ClassVar[_Neutral] = _NEUTRAL_CHAT
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=_MAX_LOGPROBS)

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise RequestError(
                f"'max_tokens' is {both[0]} and 'max_completion_tokens' is {both[1]}.", "Send one of them."
            ).at("max_completion_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("'top_logprobs' is set but 'logprobs' is not true.", "Set 'logprobs': true.").at(
                "top_logprobs"
            )
        return self

    @property
    def wanted_tokens(self) -> int | None:
        """Most tokens of one answer, if the caller says so."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives reported per token; None for no log probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


_TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
_Prompts = Annotated[list[str], Field(min_length=1, max_length=_MAX_PROMPTS)]
_TokenPrompts = Annotated[list[_TokenIds], Field(min_length=1, max_length=_MAX_PROMPTS)]


class CompletionBody(GenerationBody):
    """Body of `/v1/completions`. prompt: text, texts, token ids or lists of token ids."""

    neutral: ClassVar[_Neutral] = _NEUTRAL_COMPLETION
    default_tokens: ClassVar[int | None] = 16  # OpenAI's default for this endpoint.
    prompt: str | _Prompts | _TokenIds | _TokenPrompts
    logprobs: int | None = Field(None, ge=0, le=_MAX_LOGPROBS)

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry per prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[token_id for token_id in self.prompt if isinstance(token_id, int)]]
        return [prompt for prompt in self.prompt if not isinstance(prompt, int)]

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives reported per token; None for no log probabilities."""
        return self.logprobs
