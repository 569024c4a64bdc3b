"""What an answer must look like: OpenAI's `response_format` and vLLM's `structured_outputs`, as one output rule.

Shapes: https://platform.openai.com/docs/api-reference/chat/create and
https://docs.vllm.ai/en/latest/features/structured_outputs. Whether a rule can be used, the engine decides.
"""

from __future__ import annotations

import json
from typing import Annotated, ClassVar, Literal, Self, cast

from pydantic import Field, JsonValue, model_validator

from adapterhub.errors import RequestError
from server.engine.types import OutputRule
from server.http.body import Body, Neutral

__all__ = ["ResponseFormat", "StructuredOutputs"]


class _TextFormat(Body):
    """Free text."""

    place: ClassVar[str] = "response_format"
    type: Literal["text"]

    def rule(self) -> None:
        """Ask for nothing."""


class _JsonObjectFormat(Body):
    """Any JSON object."""

    place: ClassVar[str] = "response_format"
    type: Literal["json_object"]

    def rule(self) -> OutputRule:
        """Write the rule for the engine."""
        return OutputRule("json_object")


class _NamedSchema(Body):
    """A JSON schema. strict: accepted for clients that send it; an answer always matches its schema."""

    place: ClassVar[str] = "response_format.json_schema"
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    schema_: dict[str, JsonValue] = Field(alias="schema")
    strict: bool | None = None


class _JsonSchemaFormat(Body):
    """JSON that matches a schema."""

    place: ClassVar[str] = "response_format"
    type: Literal["json_schema"]
    json_schema: _NamedSchema

    def rule(self) -> OutputRule:
        """Write the rule for the engine."""
        return _schema_rule(self.json_schema.schema_)


ResponseFormat = Annotated[_TextFormat | _JsonObjectFormat | _JsonSchemaFormat, Field(discriminator="type")]


class StructuredOutputs(Body):
    """Either of `regex` and `json`; a schema may be an object or its text."""

    neutral: ClassVar[Neutral] = {
        "choice": (),
        "disable_additional_properties": (False,),
        "disable_any_whitespace": (False,),
        "disable_fallback": (False, True),
        "grammar": (),
        "json_object": (False,),
        "structural_tag": (),
        "whitespace_pattern": (),
    }
    place: ClassVar[str] = "structured_outputs"
    regex: str | None = None
    json_: str | dict[str, JsonValue] | None = Field(None, alias="json")

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if (self.regex is None) == (self.json_ is None):
            has = "neither 'regex' nor 'json'" if self.regex is None else "both 'regex' and 'json'"
            raise RequestError(f"'structured_outputs' has {has}.", "Send one of them.").at("structured_outputs")
        return self

    def rule(self) -> OutputRule:
        """Write the rule for the engine. Raises RequestError for text that is no JSON object."""
        if self.regex is not None:
            return OutputRule("regex", self.regex)
        try:
            schema = cast("object", json.loads(self.json_)) if isinstance(self.json_, str) else self.json_
            if isinstance(schema, dict):
                return _schema_rule(cast("dict[str, JsonValue]", schema))
        except (ValueError, RecursionError) as exc:
            raise _no_schema(f"is no JSON: {exc}") from exc
        raise _no_schema("is no JSON object")


def _schema_rule(schema: dict[str, JsonValue]) -> OutputRule:
    # Not sorted: an answer has its properties in the order of the schema.
    return OutputRule("json_schema", json.dumps(schema, ensure_ascii=False, separators=(",", ":")))


def _no_schema(what: str) -> RequestError:
    error = RequestError(f"The text in 'structured_outputs.json' {what}.", "Send a JSON schema, as object or text.")
    return error.at("structured_outputs.json")
