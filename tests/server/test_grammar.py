"""Whatever a model wants to say, an answer under an output rule obeys it; rules nobody can obey are refused first."""

from __future__ import annotations

import asyncio
import json
import random
import re
from typing import Literal

import numpy as np
import pytest
from pydantic import BaseModel, ConfigDict, Field

from adapterhub.base import Base
from adapterhub.base.loading import load_tokenizer
from adapterhub.base.prompts import stop_token_ids
from adapterhub.errors import AdapterHubError, RequestError
from server.engine.grammar import Grammars, Matcher
from server.engine.types import Event, FinishEvent, OutputRule, TokenEvent
from tests.support.engines import TOKENIZER, collect, request, running
from tests.support.fake_runner import FakeRunner

JSON_DOCS = "Supported keywords: https://github.com/guidance-ai/llguidance/blob/main/docs/json_schema.md."
REGEX_DOCS = "Write it in Rust's syntax, without look-around and back-references: https://docs.rs/regex."
DATE = OutputRule("regex", r"[0-9]{4}-(0[1-9]|1[0-2]) (é|😀)+!")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")
    kind: Literal["bolt", "nut"]
    size: int = Field(ge=-3, le=12)


class _Order(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str = Field(max_length=6)
    is_paid: bool
    price: float | None
    parts: list[_Part] = Field(min_length=1, max_length=3)


PART = OutputRule("json_schema", json.dumps(_Part.model_json_schema()))
ORDER = OutputRule("json_schema", json.dumps(_Order.model_json_schema()))


def _grammars(tokenizer=TOKENIZER) -> Grammars:
    num_tokens = 1 + max(tokenizer.get_vocab().values())
    return Grammars(tokenizer, stop_token_ids(tokenizer), num_tokens=num_tokens)


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return _grammars()


@pytest.fixture(scope="module")
def real_tokenizer(real_base: Base):
    return load_tokenizer(real_base)


async def _matcher(grammars: Grammars, rule: OutputRule) -> Matcher:
    matcher = await grammars.matcher(rule)
    assert matcher is not None
    return matcher


def _wander(matcher: Matcher, tokenizer, seed: int) -> str:
    """An answer of allowed tokens taken at random, to its end."""
    chance, stops, tokens = random.Random(seed), set(stop_token_ids(tokenizer)), []
    while not matcher.is_complete:
        allowed = np.flatnonzero(matcher.allowed()).tolist()
        ends = stops & set(allowed)
        if ends and (len(ends) == len(allowed) or chance.random() < 0.2):
            break
        tokens.append(chance.choice([token for token in allowed if token not in ends]))
        matcher.accept(tokens[-1])
    return tokenizer.decode(tokens)


async def test_every_random_answer_obeys_its_schema_or_expression(grammars: Grammars) -> None:
    for seed in range(15):
        text = _wander(await _matcher(grammars, ORDER), TOKENIZER, seed)
        assert list(json.loads(text)) == ["name", "is_paid", "price", "parts"]
        _Order.model_validate_json(text)
        assert re.fullmatch(DATE.text, _wander(await _matcher(grammars, DATE), TOKENIZER, seed))


@pytest.mark.real_base
async def test_every_random_answer_of_the_embedded_base_obeys_too(real_tokenizer) -> None:
    grammars = _grammars(real_tokenizer)
    for seed in range(15):
        _Order.model_validate_json(_wander(await _matcher(grammars, ORDER), real_tokenizer, seed))
        assert re.fullmatch(DATE.text, _wander(await _matcher(grammars, DATE), real_tokenizer, seed))


async def test_stop_tokens_are_allowed_exactly_where_the_answer_may_end(grammars: Grammars) -> None:
    matcher = await _matcher(grammars, OutputRule("regex", "ab?c*"))
    stops = list(stop_token_ids(TOKENIZER))
    seen = []
    for letter in "abc":
        seen.append(matcher.allowed()[stops].tolist())
        matcher.accept(TOKENIZER(letter)["input_ids"][0])
    seen.append(matcher.allowed()[stops].tolist())
    assert seen == [[False], [True], [True], [True]]
    assert not matcher.is_complete


async def test_whitespace_between_the_parts_of_json_is_bounded(grammars: Grammars) -> None:
    def fits(matcher: Matcher, text: str) -> bool:
        for token_id in TOKENIZER(text)["input_ids"]:
            if not matcher.allowed()[token_id]:
                return False
            matcher.accept(token_id)
        return True

    rule = OutputRule("json_object")
    assert fits(await _matcher(grammars, rule), json.dumps({"a": [1, {"b": None}]}, indent=2))
    assert fits(await _matcher(grammars, rule), json.dumps({"a": [1, {"b": None}]}, separators=(",", ":")))
    assert not fits(await _matcher(grammars, rule), '{"a":' + " " * 40)
    assert not fits(await _matcher(grammars, rule), '{"a":\n\n\n')
    assert not fits(await _matcher(grammars, rule), "[")


async def test_answers_under_one_rule_do_not_disturb_each_other(grammars: Grammars) -> None:
    alone = _wander(await _matcher(grammars, ORDER), TOKENIZER, 1)
    first, second = await asyncio.gather(_matcher(grammars, ORDER), _matcher(grammars, ORDER))
    _wander(first, TOKENIZER, 2)
    assert _wander(second, TOKENIZER, 1) == alone


async def test_more_rules_than_are_kept_all_work(grammars: Grammars) -> None:
    for number in [*range(80), *range(80)]:
        assert _wander(await _matcher(grammars, OutputRule("regex", f"n{number}")), TOKENIZER, 0) == f"n{number}"


async def test_free_text_has_no_matcher(grammars: Grammars) -> None:
    assert await grammars.matcher(None) is None


def _schema(text: str) -> OutputRule:
    return OutputRule("json_schema", text)


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (_schema('{"type": "objekt"}'), "Invalid type: objekt"),
        (_schema('{"type": "string", "minLength": 5, "maxLength": 2}'), "minLength (5) is greater than maxLength (2)"),
        (_schema('{"type": "integer", "minimum": 5, "maximum": 2}'), "minimum (5) is greater than maximum (2)"),
        (_schema('{"enum": []}'), "Unsatisfiable schema: anyOf is empty"),
        (_schema('{"allOf": [{"type": "string"}, {"type": "null"}]}'), "Unsatisfiable schema: incompatible types"),
        (
            _schema('{"type": "object", "properties": {"a": false}, "required": ["a"]}'),
            "required property 'a' is unsatisfiable",
        ),
        (_schema('{"$ref": "#"}'), "nothing satisfies it"),
        (_schema('{"$ref": "#/$defs/a"}'), "Pointer '/$defs/a' does not exist"),
        (_schema('{"$ref": "https://example.com/a.json"}'), "'https://example.com/a.json' is not present"),
        (_schema('{"not": {"type": "string"}}'), 'Unimplemented keys: ["not"]'),
        (_schema('{"x-guidance": {"lenient": true}, "uniqueItems": true}'), 'Unimplemented keys: ["uniqueItems"]'),
        (_schema('{"oneOf": [{"type": "number"}, {"type": "integer"}]}'), "oneOf constraints are not supported."),
        (_schema('{"type": "array", "items": ' * 200 + "{}" + "}" * 200), "recursion limit exceeded"),
        (_schema('{"enum": ["' + "x" * (1 << 16) + '"]}'), "it has 65550 characters, and at most 65536 are allowed"),
        (OutputRule("regex", "(a"), "unclosed group."),
        (OutputRule("regex", "(?=a)a"), "look-around, including look-ahead and look-behind, is not supported."),
        (OutputRule("regex", r"(a)\1"), "backreferences are not supported."),
        (OutputRule("regex", r"\bword"), "lookarounds not supported yet"),
        (OutputRule("regex", r"a[^\s\S]"), "nothing satisfies it."),
        (OutputRule("regex", "(a{1000}){1000}"), "it is too complex."),
    ],
    ids=lambda value: value.text[:30] if isinstance(value, OutputRule) else None,
)
async def test_rules_that_cannot_be_used_are_refused_with_the_reason(
    grammars: Grammars, rule: OutputRule, reason: str
) -> None:
    for _ in range(2):  # The second time from memory.
        with pytest.raises(RequestError) as refused:
            await grammars.matcher(rule)
        name, docs = ("JSON schema", JSON_DOCS) if rule.kind == "json_schema" else ("regular expression", REGEX_DOCS)
        assert refused.value.what.startswith(f"The {name} cannot be used: ")
        assert reason in refused.value.what
        assert "\n" not in refused.value.what
        assert refused.value.hint == docs
        assert refused.value.param == "output"


async def test_a_tokenizer_that_hides_its_bytes_cannot_obey_rules() -> None:
    class SlowTokenizer:
        get_vocab = TOKENIZER.get_vocab
        eos_token_id = TOKENIZER.eos_token_id

    with pytest.raises(RequestError) as refused:
        await _grammars(SlowTokenizer()).matcher(OutputRule("json_object"))
    assert str(refused.value) == (
        "The JSON object cannot be used: the tokenizer of this base does not tell the bytes of its tokens. "
        "Ask for free text."
    )


async def test_a_matcher_that_was_led_astray_says_so(grammars: Grammars) -> None:
    matcher = await _matcher(grammars, OutputRule("regex", "ab"))
    matcher.accept(TOKENIZER("x")["input_ids"][0])
    with pytest.raises(AdapterHubError) as stuck:
        matcher.allowed()
    assert stuck.value.what.startswith("The answer cannot be continued within its output rule: ")
    assert stuck.value.hint == "Simplify the schema or the regular expression."
    assert not matcher.is_complete


def _text(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, TokenEvent))


async def test_preempted_answers_obey_their_rule_and_are_what_they_are_alone() -> None:
    asked = [
        request("part", max_tokens=100, temperature=1.0, seed="3", output=PART),
        request("date", max_tokens=40, temperature=1.0, seed="5", output=DATE),
        request("free", max_tokens=90, temperature=1.0, seed="1", frequency_penalty=1.0, repetition_penalty=1.5),
        request("long", max_tokens=100, temperature=1.0, seed="2", top_p=0.9, presence_penalty=1.0),
    ]
    async with running(FakeRunner(num_blocks=256), prefix_cache=False) as engine:
        alone = [await collect(engine, one) for one in asked]
    runner = FakeRunner(num_blocks=28)
    async with running(runner, prefix_cache=False) as engine:
        together = await asyncio.gather(*(collect(engine, one) for one in asked))
    assert any(row.start == 0 and len(row.token_ids) > 5 for step in runner.steps for row in step)  # Begun again.
    assert list(together) == alone
    _Part.model_validate_json(_text(alone[0]))
    assert re.fullmatch(DATE.text, _text(alone[1]))
    reasons = [events[-1].reason for events in alone if isinstance(events[-1], FinishEvent)]
    assert reasons == ["stop", "stop", "length", "length"]


async def test_an_answer_cut_by_max_tokens_says_length_and_a_whole_one_says_stop() -> None:
    async with running(FakeRunner()) as engine:
        for max_tokens, reason in ((5, "length"), (6, "stop"), (7, "stop")):
            events = await collect(engine, request("x", max_tokens=max_tokens, output=OutputRule("regex", "abcdef")))
            assert _text(events) == "abcdef"[:max_tokens]
            assert isinstance(events[-1], FinishEvent)
            assert events[-1].reason == reason


async def test_an_engine_refuses_a_rule_before_it_generates() -> None:
    runner = FakeRunner()
    async with running(runner) as engine:
        with pytest.raises(RequestError, match="unclosed group"):
            await collect(engine, request("x", output=OutputRule("regex", "(")))
        assert not runner.steps
        assert isinstance((await collect(engine, request("y")))[-1], FinishEvent)
