"""What a client gets: shapes, adapters, choices, streams, log probabilities, usage."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import ClassVar

import httpx
import pytest

from server.engine.fake import FakeEngine
from server.engine.types import Event, GenerateRequest, OutputRule, SamplingParams

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hi"}]
# What the tiny base's template makes of HELLO, without its special tokens.
PROMPT = "user\nhi\nassistant\n"
USAGE = {"prompt_tokens": 21, "prompt_tokens_details": {"cached_tokens": 0}}


def _events(response: httpx.Response) -> list[dict]:
    lines = [line for line in response.text.split("\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_a_chat_answer_has_the_openai_shape_and_names_its_adapter(client: httpx.Client, lab) -> None:
    response = client.post(CHAT, json={"model": "summarize", "messages": HELLO}, headers={"x-request-id": "r-1"})
    digest = lab.store.get_version("summarize").serving_digest
    body = response.json()
    assert response.status_code == 200
    assert response.headers["x-request-id"] == "r-1"
    assert response.headers["x-adapter-digest"] == f"sha256:{digest}"
    assert response.headers["x-adapter-version"] == "summarize@v1"
    assert body.pop("created") > 0
    assert body == {
        "id": "chatcmpl-r-1",
        "object": "chat.completion",
        "model": "summarize@v1",
        "system_fingerprint": f"fp_{lab.base.digest[:12]}",
        "adapter": {"task": "summarize", "version": 1, "digest": f"sha256:{digest}"},
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": f"[summarize@v1] {PROMPT}", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": USAGE | {"completion_tokens": 33, "total_tokens": 54},
    }


@pytest.mark.parametrize(
    ("fields", "label"),
    [
        ({}, "base"),
        ({"model": "tiny-llama"}, "base"),
        ({"model": "base"}, "base"),
        ({"adapter": "base"}, "base"),
        ({"adapter": "summarize"}, "summarize@v1"),
        ({"adapter": "summarize@stable"}, "summarize@v1"),
        ({"adapter": "summarize@v2"}, "summarize@v2"),
        ({"adapter": "boolq", "model": "tiny-llama"}, "boolq@v1"),
        ({"adapter": "boolq", "model": "boolq@v1"}, "boolq@v1"),
        ({"model": "boolq@stable"}, "boolq@v1"),
    ],
)
def test_every_way_to_name_an_adapter_reaches_it(client: httpx.Client, fields: dict, label: str) -> None:
    response = client.post("/v1/completions", json={"prompt": "x", "max_tokens": 99} | fields)
    assert response.json()["choices"][0]["text"] == f"[{label}] x"
    assert response.headers["x-adapter-version"] == label


def test_a_digest_names_an_adapter_with_and_without_its_task(client: httpx.Client, lab) -> None:
    digest = lab.store.get_version("summarize@v2").serving_digest
    for name in (f"summarize@sha256:{digest}", f"sha256:{digest}", f"summarize@sha256:{digest[:8]}"):
        response = client.post("/v1/completions", json={"prompt": "x", "adapter": name})
        assert response.headers["x-adapter-digest"] == f"sha256:{digest}"
        assert response.json()["adapter"] == {"task": "summarize", "version": 2, "digest": f"sha256:{digest}"}


def test_the_base_says_that_it_is_the_base(client: httpx.Client) -> None:
    response = client.post(CHAT, json={"messages": HELLO})
    assert response.headers["x-adapter-digest"] == "base"
    assert response.json()["adapter"] == {"task": "base", "version": None, "digest": None}
    assert response.json()["model"] == "tiny-llama"


def test_a_stream_carries_role_text_finish_usage_and_done(client: httpx.Client) -> None:
    body = {"adapter": "boolq", "messages": HELLO, "stream": True, "stream_options": {"include_usage": True}}
    response = client.post(CHAT, json=body)
    events = _events(response)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-adapter-version"] == "boolq@v1"
    assert all(event["adapter"]["task"] == "boolq" for event in events)
    assert all(event["object"] == "chat.completion.chunk" for event in events)
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in events[:-1])
    assert text == f"[boolq@v1] {PROMPT}"
    assert events[-2]["choices"][0]["finish_reason"] == "stop"
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == USAGE | {"completion_tokens": 29, "total_tokens": 50}
    assert all(event["usage"] is None for event in events[:-1])


def test_a_stream_without_include_usage_ends_with_the_finish_chunk(client: httpx.Client) -> None:
    events = _events(client.post("/v1/completions", json={"prompt": "x", "stream": True}))
    assert "".join(event["choices"][0]["text"] for event in events) == "[base] x"
    assert events[-1]["choices"][0]["finish_reason"] == "stop"


def test_characters_of_several_tokens_are_never_split_in_a_stream(client: httpx.Client) -> None:
    events = _events(client.post("/v1/completions", json={"prompt": "é😀", "stream": True, "max_tokens": 50}))
    pieces = [event["choices"][0]["text"] for event in events]
    assert "é" in pieces
    assert "😀" in pieces


def test_choices_and_prompts_are_answered_side_by_side(client: httpx.Client) -> None:
    body = {"prompt": ["a", "bc"], "n": 2, "adapter": "boolq", "max_tokens": 50}
    reply = client.post("/v1/completions", json=body).json()
    assert [choice["text"] for choice in reply["choices"]] == ["[boolq@v1] a"] * 2 + ["[boolq@v1] bc"] * 2
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
    assert reply["usage"]["prompt_tokens"] == 3  # A prompt counts once, not once per choice.
    events = _events(client.post("/v1/completions", json=body | {"stream": True}))
    texts = ["".join(e["choices"][0]["text"] for e in events if e["choices"][0]["index"] == idx) for idx in range(4)]
    assert texts == [choice["text"] for choice in reply["choices"]]


def test_a_prompt_may_be_token_ids(client: httpx.Client, lab) -> None:
    ids = lab.tokenizer("token ids", add_special_tokens=False)["input_ids"]
    for prompt in (ids, [ids]):
        reply = client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 50}).json()
        assert reply["choices"][0]["text"] == "[base] token ids"


def test_max_tokens_and_stop_strings_end_an_answer(client: httpx.Client) -> None:
    def finish(**fields) -> tuple[str, str, int]:
        reply = client.post(CHAT, json={"messages": HELLO} | fields).json()
        choice = reply["choices"][0]
        return choice["message"]["content"], choice["finish_reason"], reply["usage"]["completion_tokens"]

    assert finish(max_tokens=4) == ("[bas", "length", 4)
    assert finish(max_completion_tokens=4) == ("[bas", "length", 4)
    assert finish(stop="] user") == ("[base", "stop", 11)
    assert finish(stop=["nowhere", "se"]) == ("[ba", "stop", 5)
    assert client.post("/v1/completions", json={"prompt": "x" * 40}).json()["usage"]["completion_tokens"] == 16


def test_log_probabilities_come_in_the_form_of_each_endpoint(client: httpx.Client) -> None:
    chat = client.post(CHAT, json={"messages": HELLO, "max_tokens": 2, "logprobs": True, "top_logprobs": 1}).json()
    first = {"token": "[", "logprob": -0.5, "bytes": [91]}
    assert chat["choices"][0]["logprobs"]["content"][0] == first | {"top_logprobs": [first]}
    body = {"prompt": "x", "max_tokens": 2, "logprobs": 1}
    plain = client.post("/v1/completions", json=body).json()
    expected = {
        "tokens": ["[", "b"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"[": -0.5}, {"b": -0.5}],
        "text_offset": [0, 1],
    }
    assert plain["choices"][0]["logprobs"] == expected
    events = _events(client.post("/v1/completions", json=body | {"stream": True}))
    assert [event["choices"][0]["logprobs"]["text_offset"] for event in events[:2]] == [[0], [1]]
    events = _events(client.post(CHAT, json={"messages": HELLO, "max_tokens": 1, "logprobs": True, "stream": True}))
    assert events[1]["choices"][0]["logprobs"]["content"] == [first | {"top_logprobs": []}]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop", [None, ["é!"]])
def test_text_offsets_count_characters_of_the_answer(
    client: httpx.Client, stream: bool, stop: list[str] | None
) -> None:
    body = {"prompt": "aé😀b", "max_tokens": 50, "logprobs": 0, "stream": stream, "stop": stop}
    response = client.post("/v1/completions", json=body)
    replies = _events(response) if stream else [response.json()]
    offsets = [offset for one in replies for offset in (one["choices"][0]["logprobs"] or {}).get("text_offset", [])]
    assert offsets == [*range(7), 7, 8, 8, 9, 9, 9, 9, 10]  # "[base] ", then characters of 1, 2, 4 and 1 tokens.


def test_tokens_that_are_parts_of_characters_are_told_apart(client: httpx.Client) -> None:
    reply = client.post("/v1/completions", json={"prompt": "é", "max_tokens": 50, "logprobs": 1}).json()
    logprobs = reply["choices"][0]["logprobs"]
    assert logprobs["tokens"][-2:] == ["bytes:\\xc3", "bytes:\\xa9"]
    assert logprobs["top_logprobs"][-2:] == [{"bytes:\\xc3": -0.5}, {"bytes:\\xa9": -0.5}]


def test_neutral_values_of_unsupported_fields_are_accepted(client: httpx.Client) -> None:
    neutral = {
        "logit_bias": {},
        "tools": None,
        "tool_choice": "none",
        "n": 1,
        "store": False,
        "metadata": {},
        "user": "u-1",
        "seed": None,
        "stop": None,
    }
    assert client.post(CHAT, json={"messages": HELLO} | neutral).status_code == 200
    plain = {"prompt": "x", "best_of": 1, "echo": False, "suffix": None, "logit_bias": None}
    assert client.post("/v1/completions", json=plain).status_code == 200


def test_every_field_reaches_the_engine(lab, serve) -> None:
    class RecordingEngine(FakeEngine):
        seen: ClassVar[list[GenerateRequest]] = []

        def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
            self.seen.append(request)
            return super().generate(request)

    cuts = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1}
    penalties = {"repetition_penalty": 1.2, "presence_penalty": -1, "frequency_penalty": 0.5}
    body = {"prompt": "x", "max_tokens": 3, "priority": -2, "seed": 4, "stop": "z", "logprobs": 2, **cuts, **penalties}
    schema = {"b": {}, "a": {"é": 1}}
    engine = RecordingEngine(lab.tokenizer, lambda text: lab.tokenizer(text)["input_ids"], context_tokens=256)
    with serve(engine) as client:
        client.post("/v1/completions", json=body | {"structured_outputs": {"json": schema}})
        client.post("/v1/completions", json={"prompt": "x", "response_format": {"type": "json_object"}})
        client.post("/v1/completions", json={"prompt": "x", "top_k": None, "priority": None})
        client.post("/v1/completions", json={"prompt": "x", "ignore_eos": True})
    full, form, bare, endless = engine.seen
    rule = OutputRule("json_schema", '{"b":{},"a":{"é":1}}')  # In the order of the schema: answers follow it.
    rest = {"max_tokens": 3, "seed": "4:0:0", "stop": ("z",), "logprobs": 2, "output": rule}
    assert full.sampling == SamplingParams(**cuts, **penalties, **rest)
    assert full.priority == -2
    assert form.sampling == SamplingParams(max_tokens=16, temperature=1.0, output=OutputRule("json_object"))
    assert bare.sampling == SamplingParams(max_tokens=16, temperature=1.0)
    assert bare.priority == 0
    assert endless.sampling == SamplingParams(max_tokens=16, temperature=1.0, ignore_eos=True)


def test_messages_may_have_text_parts_and_come_back_as_the_client_got_them(client: httpx.Client) -> None:
    got = client.post(CHAT, json={"messages": HELLO}).json()["choices"][0]["message"]
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "be brief"}, *HELLO, got | {"tool_calls": None}]
    messages += [{"role": "user", "content": parts}]
    reply = client.post(CHAT, json={"messages": messages}).json()
    answer = reply["choices"][0]["message"]["content"]
    assert answer.startswith("[base] system\nbe brief\nuser\nhi\n")
    assert answer.endswith("user\nab\nassistant\n")


def test_models_lists_the_base_the_tasks_and_their_versions(client: httpx.Client, lab) -> None:
    cards = {card["id"]: card for card in client.get("/v1/models").json()["data"]}
    assert list(cards) == ["tiny-llama", "boolq", "boolq@v1", "summarize", "summarize@v1", "summarize@v2"]
    assert cards["summarize"]["digest"] == cards["summarize@v1"]["digest"]
    assert cards["summarize@v1"]["aliases"] == ["summarize@stable"]
    assert cards["summarize"]["parent"] == "tiny-llama"
    assert client.get("/v1/models/summarize@v2").json() == cards["summarize@v2"]
    assert client.get("/v1/models/tiny-llama").json()["digest"] == f"sha256:{lab.base.digest}"


def test_probes_answer(client: httpx.Client) -> None:
    assert client.get("/health/live").json() == {"status": "live"}
    assert client.get("/health/ready").json() == {"status": "ready", "running": 0, "waiting": 0}
    assert client.get("/health/startup").json() == {"status": "started"}


def test_the_api_describes_itself(client: httpx.Client) -> None:
    schema = client.get("/openapi.json").json()
    assert "adapter" in schema["components"]["schemas"]["ChatBody"]["properties"]
