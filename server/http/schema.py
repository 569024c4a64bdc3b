"""Bodies of requests. A field we do not support is refused by name, unless its value asks for nothing.

Field names and limits follow the OpenAI API reference, https://platform.openai.com/docs/api-reference.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self, cast

from pydantic import Field, JsonValue, model_validator

from adapterhub.errors import RequestError, UnsupportedFieldError
from server.engine.types import OutputRule, SamplingParams
from server.http.body import Body, Neutral
from server.http.output import ResponseFormat, StructuredOutputs

__all__ = ["ChatBody", "ChatMessage", "CompletionBody", "GenerationBody", "StreamOptions", "TextPart"]

_MAX_CHOICES = 16
_MAX_STOP_STRINGS = 16
_MAX_LOGPROBS = 20  # OpenAI's limit for `top_logprobs`.
_MAX_PROMPTS = 64
_MAX_REPETITION = 10.0  # Ten times beyond any use known; keeps penalized logits finite.
_MAX_PRIORITY = 100

# Fields of the OpenAI API without support here, and the values besides null that ask for nothing.
_NEUTRAL: Neutral = {"logit_bias": ({},)}
_NEUTRAL_CHAT: Neutral = {
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
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none",),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}
_NEUTRAL_COMPLETION: Neutral = {**_NEUTRAL, "best_of": (1,), "echo": (False,), "suffix": ("",)}
_NEUTRAL_MESSAGE: Neutral = {
    "name": (),
    "refusal": (),
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "tool_calls": ([],),
    "tool_call_id": (),
}


class TextPart(Body):
    """One part of a message's content; text is the only kind."""

    type: Literal["text"]
    text: str


class ChatMessage(Body):
    """One message. `developer` is OpenAI's newer word for `system`."""

    neutral: ClassVar[Neutral] = _NEUTRAL_MESSAGE
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


class StreamOptions(Body):
    """include_usage: send one more chunk with the token counts."""

    neutral: ClassVar[Neutral] = {"include_obfuscation": (False,)}
    place: ClassVar[str] = "stream_options"
    include_usage: bool | None = None


class GenerationBody(Body):
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
    top_k: int | None = Field(None, ge=0, description="Draw from so many best tokens; 0 is all, the default.")
    ignore_eos: bool | None = Field(None, description="Go on after the token that ends an answer; for measurements.")
    min_p: float | None = Field(None, ge=0, le=1, description="Smallest share of the best token's probability.")
    repetition_penalty: float | None = Field(None, gt=0, le=_MAX_REPETITION, description="1 is none, the default.")
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    max_tokens: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1, le=_MAX_CHOICES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | Annotated[list[str], Field(max_length=_MAX_STOP_STRINGS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    priority: int | None = Field(None, ge=-_MAX_PRIORITY, le=_MAX_PRIORITY, description="Lower runs earlier.")
    user: str | None = Field(None, description="Who asks; accepted for clients that send it, not used.")

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise RequestError("'stream_options' is set but 'stream' is not true.", "Set 'stream': true.").at(
                "stream_options"
            )
        if "" in self.stop_strings:
            raise RequestError("'stop' holds an empty string.", "Leave it out.").at("stop")
        if self.structured_outputs is not None and self.response_format is not None:
            raise RequestError("'response_format' and 'structured_outputs' are both set.", "Send one of them.").at(
                "structured_outputs"
            )
        if self.ignore_eos and self.output_rule is not None:
            raise RequestError(
                f"'ignore_eos' is true, but {self.output_field!r} says where the answer ends.", "Send one of them."
            ).at("ignore_eos")
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
    def output_field(self) -> str:
        """The field that says what the answer must look like, for messages."""
        return "response_format" if self.structured_outputs is None else "structured_outputs"

    @property
    def output_rule(self) -> OutputRule | None:
        """What the answer must look like; None for free text."""
        form = self.response_format or self.structured_outputs
        return None if form is None else form.rule()

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
            top_k=self.top_k or 0,
            min_p=self.min_p or 0.0,
            ignore_eos=self.ignore_eos or False,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            seed=None if self.seed is None else f"{self.seed}:{prompt_idx}:{choice_idx}",
            stop=self.stop_strings,
            logprobs=self.num_logprobs,
            output=self.output_rule,
        )


class ChatBody(GenerationBody):
    """Body of `/v1/chat/completions`."""

    neutral: ClassVar[Neutral] = _NEUTRAL_CHAT
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

    neutral: ClassVar[Neutral] = _NEUTRAL_COMPLETION
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
