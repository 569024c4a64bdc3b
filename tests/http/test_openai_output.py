"""The official OpenAI client asks a real engine with a random model for answers of a form, and gets nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from enum import Enum
from typing import Literal

import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field

from server.engine.build import build_engine
from server.http import create_app
from tests.support.live_server import live_server

HELLO = [{"role": "user", "content": "hi"}]


class _Colour(Enum):
    RED = "red"
    GREEN = "green"


class _Point(BaseModel):
    model_config = ConfigDict(extra="forbid")
    x: int = Field(ge=0, le=99)
    y: int = Field(ge=-9, le=9)


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid")
    kind: Literal["dot", "line"]
    colour: _Colour | None
    points: list[_Point] = Field(min_length=1, max_length=2)


class _Verdict(BaseModel):
    model_config = ConfigDict(extra="forbid")
    is_true: bool
    why: str = Field(pattern=r"^[a-z]{1,5}( [a-z]{1,5})?$")


@pytest.fixture(scope="module")
def url(lab) -> Iterator[str]:
    engine = build_engine(lab.base, num_slots=2, kv_memory_mib=8)
    with live_server(create_app(engine, lab.store, lab.base, lab.tokenizer)) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("model", [_Point, _Shape, _Verdict])
@pytest.mark.parametrize("temperature", [0, 1])
def test_a_schema_given_as_a_class_comes_back_as_an_object(
    client: openai.OpenAI, model: type[BaseModel], temperature: int
) -> None:
    reply = client.chat.completions.parse(
        model="summarize", messages=HELLO, response_format=model, temperature=temperature, seed=1, n=2
    )
    assert all(isinstance(choice.message.parsed, model) for choice in reply.choices)
    assert {choice.finish_reason for choice in reply.choices} == {"stop"}


def test_both_ways_to_send_a_schema_and_a_stream_give_the_same_answer(client: openai.OpenAI) -> None:
    schema = _Shape.model_json_schema()
    options = {"model": "base", "messages": HELLO, "seed": 3, "max_tokens": 300}
    form = {"type": "json_schema", "json_schema": {"name": "shape", "schema": schema}}
    whole = client.chat.completions.create(**options, response_format=form).choices[0].message.content
    for value in (schema, json.dumps(schema)):
        extra = {"structured_outputs": {"json": value}}
        assert client.chat.completions.create(**options, extra_body=extra).choices[0].message.content == whole
    stream = client.chat.completions.create(**options, response_format=form, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole
    assert list(json.loads(whole)) == ["kind", "colour", "points"]


@pytest.mark.parametrize("expression", [r"[0-9]{3}-[a-f]+\.", "(yes|no)( and (yes|no)){0,3}!", "«[éü😀]{2,5}»"])
def test_an_expression_is_matched_from_end_to_end(client: openai.OpenAI, expression: str) -> None:
    for seed in range(3):
        extra = {"structured_outputs": {"regex": expression}}
        reply = client.completions.create(model="base", prompt="x", max_tokens=200, seed=seed, extra_body=extra)
        assert reply.choices[0].finish_reason == "stop"
        assert re.fullmatch(expression, reply.choices[0].text)


def test_the_bytes_of_tokens_join_to_the_answer_and_scores_know_no_rule(client: openai.OpenAI) -> None:
    extra = {"structured_outputs": {"regex": "«[éü😀]{2,5}»"}}
    options = {"model": "base", "messages": HELLO, "temperature": 0, "logprobs": True, "top_logprobs": 1}
    (choice,) = client.chat.completions.create(**options, extra_body=extra).choices
    scores = choice.logprobs.content
    assert b"".join(bytes(score.bytes) for score in scores) == choice.message.content.encode()
    assert any(score.logprob < score.top_logprobs[0].logprob for score in scores)


def test_json_mode_gives_an_object_or_the_beginning_of_one(client: openai.OpenAI) -> None:
    for seed in range(5):
        options = {"model": "base", "messages": HELLO, "seed": seed, "max_tokens": 60}
        (choice,) = client.chat.completions.create(**options, response_format={"type": "json_object"}).choices
        assert choice.message.content.startswith("{")
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)


def test_an_answer_that_max_tokens_cuts_says_length(client: openai.OpenAI) -> None:
    extra = {"structured_outputs": {"regex": "abcdef"}}
    for max_tokens, finish in ((5, "length"), (6, "stop")):
        reply = client.completions.create(model="base", prompt="x", max_tokens=max_tokens, extra_body=extra)
        assert reply.choices[0].text == "abcdef"[:max_tokens]
        assert reply.choices[0].finish_reason == finish


def test_text_and_nothing_are_the_same_form(client: openai.OpenAI) -> None:
    options = {"model": "base", "messages": HELLO, "temperature": 0, "max_tokens": 20}
    free = client.chat.completions.create(**options).choices[0].message.content
    assert (
        client.chat.completions.create(**options, response_format={"type": "text"}).choices[0].message.content == free
    )


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_form_nothing_satisfies_is_one_clear_error(client: openai.OpenAI, is_stream: bool) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": []}}, "required": ["a"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="base", messages=HELLO, n=2, response_format=form, stream=is_stream)
    assert refused.value.body == {
        "message": "The JSON schema cannot be used: Unsatisfiable schema: required property 'a' is unsatisfiable. "
        "Supported keywords: https://github.com/guidance-ai/llguidance/blob/main/docs/json_schema.md.",
        "type": "invalid_request_error",
        "param": "response_format",
        "code": "invalid_request",
    }
    extra = {"structured_outputs": {"regex": "(a"}}
    with pytest.raises(openai.BadRequestError, match="regular expression cannot be used: unclosed group") as refused:
        client.completions.create(model="base", prompt="x", extra_body=extra, stream=is_stream)
    assert refused.value.param == "structured_outputs"
