"""What a client is told when a request is wrong: one shape, the value, what is allowed, what to do."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hi"}]
LIMITS = (
    "Name one adapter: task, task@v3, task@alias, task@sha256:<digest> or base; "
    'or send several, {"mix": {name: weight}}.'
)


def _error(response: httpx.Response, status: int) -> dict:
    assert response.status_code == status, response.text
    assert response.headers["x-request-id"]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    return error


def _chat_error(client: httpx.Client, status: int = 400, **fields: Any) -> tuple[str, str | None, str]:
    error = _error(client.post(CHAT, json={"messages": HELLO} | fields), status)
    return error["message"], error["param"], error["code"]


def test_unknown_adapters_get_near_matches(client: httpx.Client) -> None:
    message, param, code = _chat_error(client, 404, adapter="sumarize")
    assert message == "No adapter 'sumarize' among 3 published. Did you mean 'summarize'?"
    assert (param, code) == ("adapter", "adapter_not_found")
    message, param, code = _chat_error(client, 404, model="gpt-4o")
    assert "No adapter 'gpt-4o'" in message
    assert (param, code) == ("model", "adapter_not_found")
    message, param, code = _chat_error(client, 404, adapter="summarize@v9")
    assert "summarize@v" in message
    message, param, code = _chat_error(client, 404, adapter="summarize@canary")
    assert "canary" in message
    assert (param, code) == ("adapter", "alias_not_found")


@pytest.mark.parametrize("name", ["../../etc/passwd", "Summarize", "summarize@", "a\x00b", "summarize@sha256:xyz", ""])
def test_names_that_do_not_parse_are_refused(client: httpx.Client, name: str) -> None:
    message, param, code = _chat_error(client, 400, adapter=name)
    assert (param, code) == ("adapter", "invalid_name")
    assert "Allowed" in message


@pytest.mark.parametrize("word", ["auto", "mix:a=0.5", "gate:default"])
@pytest.mark.parametrize("field", ["adapter", "model"])
def test_words_that_choose_no_adapter_are_refused(client: httpx.Client, word: str, field: str) -> None:
    message, param, code = _chat_error(client, 400, **{field: word})
    assert message == f"This server does not know the adapter choice {word!r}. {LIMITS}"
    assert (param, code) == (field, "unsupported_field")


@pytest.mark.parametrize("value", [{"name": "x"}, {"gate": "default"}, {}, {"mix": {"summarize": 1}, "name": "x"}])
def test_objects_that_are_no_mix_are_refused(client: httpx.Client, value: dict) -> None:
    message, param, code = _chat_error(client, adapter=value)
    assert message == f"The object {value!r} is no adapter. {LIMITS}"
    assert (param, code) == ("adapter", "unsupported_field")


def test_adapter_and_model_that_differ_are_a_conflict(client: httpx.Client) -> None:
    message, param, code = _chat_error(client, adapter="summarize", model="boolq")
    assert message == (
        "'adapter' 'summarize' is 'summarize@v1', but 'model' 'boolq' is 'boolq@v1'. "
        "Send one of them; 'model' may always be 'tiny-llama'."
    )
    assert (param, code) == ("adapter", "invalid_request")


def test_an_adapter_of_another_base_is_refused(client: httpx.Client, lab) -> None:
    response = client.post(CHAT, json={"messages": HELLO, "adapter": "foreign"})
    error = _error(response, 409)
    foreign = lab.store.get_version("foreign").base_digest
    assert error["message"] == (
        f"Adapter 'foreign@v1' was made for base {foreign[:12]}, but this server runs 'tiny-llama' (none), "
        f"{lab.base.digest[:12]}. Serve its base with `hub serve --base B --quantization Q`, "
        "or train it again on this one."
    )
    assert (error["param"], error["code"]) == ("adapter", "base_mismatch")
    assert response.headers["x-should-retry"] == "false"


def test_unknown_fields_are_refused_with_a_near_match(client: httpx.Client) -> None:
    message, param, code = _chat_error(client, temprature=0.5)
    assert message == "Unknown field 'temprature'. Did you mean 'temperature'?"
    assert (param, code) == ("temprature", "unsupported_field")
    message, param, _ = _chat_error(client, messages=[{"role": "user", "content": "x", "zzz": 1}])
    assert message == "Unknown field 'zzz'. Supported: content, role."


@pytest.mark.parametrize(
    ("field", "value", "hint"),
    [
        ("logit_bias", {"5": 10}, "Leave it out (or send None or {})."),
        ("tools", [{"type": "function"}], "Leave it out (or send None or [])."),
        ("service_tier", "flex", "Leave it out (or send None or 'auto' or 'default')."),
        ("prompt_cache_key", "k", "Leave it out (or send None)."),
    ],
)
def test_unsupported_fields_are_refused_by_name(client: httpx.Client, field: str, value: object, hint: str) -> None:
    message, param, code = _chat_error(client, 400, **{field: value})
    assert message == f"Field {field!r} with the value {value!r} is not supported by this server. {hint}"
    assert (param, code) == (field, "unsupported_field")


def test_best_of_and_echo_are_refused_for_completions(client: httpx.Client) -> None:
    for field, value in (("best_of", 3), ("echo", True), ("suffix", "x")):
        error = _error(client.post("/v1/completions", json={"prompt": "x", field: value}), 400)
        assert error["param"] == field
        assert repr(value) in error["message"]


def test_images_and_tool_messages_are_refused(client: httpx.Client) -> None:
    parts = [{"type": "image_url", "image_url": {"url": "http://x"}}]
    message, param, _ = _chat_error(client, messages=[{"role": "user", "content": parts}])
    assert message == ("A content part of type 'image_url' is not supported by this server. Send parts of type 'text'.")
    assert param == "messages"
    message, param, _ = _chat_error(client, messages=[{"role": "tool", "content": "x"}])
    assert message.startswith("The field 'messages.0.role' has the value 'tool'. Input should be 'system',")
    assert param == "messages.0.role"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": []}, "The field 'messages' has the value []. List should have at least 1 item"),
        ({"messages": "hi"}, "The field 'messages' has the value 'hi'. Input should be a valid list."),
        ({"messages": [{"role": "user"}]}, "The field 'messages.0.content' is missing. Add it."),
        ({"temperature": 3}, "The field 'temperature' has the value 3. Input should be less than or equal to 2."),
        ({"temperature": "hot"}, "The field 'temperature' has the value 'hot'. Input should be a valid number."),
        ({"top_p": 0}, "The field 'top_p' has the value 0. Input should be greater than 0."),
        ({"top_k": -1}, "The field 'top_k' has the value -1. Input should be greater than or equal to 0."),
        ({"top_k": 1.5}, "The field 'top_k' has the value 1.5. Input should be a valid integer."),
        ({"min_p": 1.1}, "The field 'min_p' has the value 1.1. Input should be less than or equal to 1."),
        (
            {"repetition_penalty": 0},
            "The field 'repetition_penalty' has the value 0. Input should be greater than 0.",
        ),
        (
            {"repetition_penalty": 11},
            "The field 'repetition_penalty' has the value 11. Input should be less than or equal to 10.",
        ),
        (
            {"presence_penalty": -2.5},
            "The field 'presence_penalty' has the value -2.5. Input should be greater than or equal to -2.",
        ),
        (
            {"frequency_penalty": 3},
            "The field 'frequency_penalty' has the value 3. Input should be less than or equal to 2.",
        ),
        ({"priority": 101}, "The field 'priority' has the value 101. Input should be less than or equal to 100."),
        ({"priority": "high"}, "The field 'priority' has the value 'high'. Input should be a valid integer."),
        ({"n": 17}, "The field 'n' has the value 17. Input should be less than or equal to 16."),
        ({"max_tokens": 0}, "The field 'max_tokens' has the value 0. Input should be greater than or equal to 1."),
        ({"max_tokens": 1.5}, "The field 'max_tokens' has the value 1.5. Input should be a valid integer."),
        ({"seed": 2**64}, f"The field 'seed' has the value {2**64}. Input should be less than"),
        ({"stop": [""]}, "'stop' holds an empty string. Leave it out."),
        ({"stop": 5}, "The field 'stop' has the value 5. Input should be a valid string."),
        ({"stop": ["a", 5]}, "The field 'stop.1' has the value 5. Input should be a valid string."),
        (
            {"messages": [{"role": "user", "content": {"a": 1}}]},
            "The field 'messages.0.content' has the value {'a': 1}. Input should be a valid string.",
        ),
        ({"top_logprobs": 2}, "'top_logprobs' is set but 'logprobs' is not true. Set 'logprobs': true."),
        ({"stream_options": {}}, "'stream_options' is set but 'stream' is not true. Set 'stream': true."),
        (
            {"max_tokens": 5, "max_completion_tokens": 6},
            "'max_tokens' is 5 and 'max_completion_tokens' is 6. Send one of them.",
        ),
        (
            {"max_tokens": 257},
            "'max_tokens' is 257; the context of 'tiny-llama' has 256 tokens. Ask for 1 to 235.",
        ),
    ],
)
def test_values_out_of_range_are_named_with_what_is_allowed(client: httpx.Client, fields: dict, message: str) -> None:
    assert _chat_error(client, **fields)[0].startswith(message)


def test_a_context_that_is_too_long_is_refused_with_the_numbers(client: httpx.Client) -> None:
    message, param, code = _chat_error(client, max_tokens=240)
    assert message == (
        "The prompt has 21 tokens and 'max_tokens' asks for 240 more, together 261; the context of 'tiny-llama' "
        "has 256. Ask for at most 235, or shorten the prompt."
    )
    assert (param, code) == ("messages", "context_length_exceeded")
    error = _error(client.post("/v1/completions", json={"prompt": "x" * 300}), 400)
    assert error["message"] == ("The prompt has 300 tokens; the context of 'tiny-llama' has 256. Shorten the prompt.")
    assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")


def test_prompts_without_tokens_or_outside_the_vocabulary_are_refused(client: httpx.Client) -> None:
    def refuse(prompt: object, **fields) -> str:
        return _error(client.post("/v1/completions", json={"prompt": prompt} | fields), 400)["message"]

    assert refuse("") == "A prompt has no tokens. Send some text."
    assert refuse([5, 999]) == "Token id 999 is not in the vocabulary. Send ids from 0 to 258."
    assert refuse([-1]).startswith("The field 'prompt.0' has the value -1.")
    assert refuse(["x"] * 20, n=8) == (
        "20 prompts with 'n' 8 ask for 160 answers; one request gives at most 128. Send several requests."
    )


def test_bodies_that_are_not_json_objects_are_refused(client: httpx.Client) -> None:
    def refuse(status: int = 400, **how) -> tuple[str, str]:
        error = _error(client.post(CHAT, **how), status)
        return error["message"], error["code"]

    json_type = {"content-type": "application/json"}
    assert refuse(content=b'{"messages": [}', headers=json_type)[0] == (
        "The body is not valid JSON: Expecting value at character 14. Send one JSON object."
    )
    assert refuse(json=[1])[0] == "The body is [1], not a JSON object. Send one JSON object."
    assert refuse(headers=json_type)[0] == "The body is None, not a JSON object. Send one JSON object."
    assert refuse(content=b'"\xff"', headers=json_type)[0].startswith("The body cannot be read")
    text = json.dumps({"messages": HELLO}).encode()
    assert refuse(415, content=text, headers={"content-type": "text/plain"}) == (
        "The content type is 'text/plain'. Send JSON with 'content-type: application/json'.",
        "unsupported_media_type",
    )
    assert refuse(413, content=b" " * (5 << 20), headers=json_type) == (
        "The body is too large. Send shorter prompts or fewer of them.",
        "body_too_large",
    )


def test_a_chat_template_that_refuses_is_quoted(lab, serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab.tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    with serve(lab.engine()) as client:
        message = _error(client.post(CHAT, json={"messages": HELLO}), 400)["message"]
    assert message == "The chat template refused the messages: roles must alternate. Check roles and their order."


def test_unknown_routes_and_methods_get_the_same_shape(client: httpx.Client) -> None:
    error = _error(client.post("/v1/chat/completion"), 404)
    assert error["code"] == "unknown_route"
    assert error["message"] == (
        "No route '/v1/chat/completion'. Routes: /v1/chat/completions, /v1/completions, /v1/models, "
        "/admin/v1/adapters, /health/ready; see /docs."
    )
    response = client.get(CHAT)
    error = _error(response, 405)
    assert error["message"] == "GET is not allowed for '/v1/chat/completions'. Use POST."
    assert error["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"


def test_an_unknown_model_card_is_not_found(client: httpx.Client) -> None:
    error = _error(client.get("/v1/models/boolqq"), 404)
    assert error["message"] == "No adapter 'boolqq' among 3 published. Did you mean 'boolq'?"
    assert error["param"] == "model"


def test_a_request_id_that_could_forge_a_log_line_is_replaced(client: httpx.Client) -> None:
    response = client.get("/v1/models", headers={"x-request-id": "a b\tc"})
    assert len(response.headers["x-request-id"]) == 32


SCHEMA = {"name": "part", "schema": {"type": "object"}, "strict": True}


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        (
            {"response_format": {"type": "xml"}},
            "response_format",
            "The field 'response_format' has the value {'type': 'xml'}. Input tag 'xml' found using 'type' does not "
            "match any of the expected tags: 'text', 'json_object', 'json_schema'.",
        ),
        (
            {"response_format": {"type": "json_schema"}},
            "response_format.json_schema",
            "The field 'response_format.json_schema' is missing. Add it.",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "part"}}},
            "response_format.json_schema.schema",
            "The field 'response_format.json_schema.schema' is missing. Add it.",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": SCHEMA | {"name": "a b"}}},
            "response_format.json_schema.name",
            "The field 'response_format.json_schema.name' has the value 'a b'. String should match pattern "
            "'^[a-zA-Z0-9_-]{1,64}$'.",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": SCHEMA | {"schema": "{}"}}},
            "response_format.json_schema.schema",
            "The field 'response_format.json_schema.schema' has the value '{}'. Input should be a valid dictionary.",
        ),
        (
            {"response_format": {"type": "json_object", "schema": {}}},
            "response_format.schema",
            "Unknown field 'response_format.schema'. Supported: type.",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": SCHEMA | {"stict": True}}},
            "response_format.json_schema.stict",
            "Unknown field 'response_format.json_schema.stict'. Did you mean 'strict'?",
        ),
        (
            {"structured_outputs": {"regexp": "a"}},
            "structured_outputs.regexp",
            "Unknown field 'structured_outputs.regexp'. Did you mean 'regex'?",
        ),
        (
            {"stream": True, "stream_options": {"include_usages": True}},
            "stream_options.include_usages",
            "Unknown field 'stream_options.include_usages'. Did you mean 'include_usage'?",
        ),
        (
            {"ignore_eos": True, "response_format": {"type": "json_object"}},
            "ignore_eos",
            "'ignore_eos' is true, but 'response_format' says where the answer ends. Send one of them.",
        ),
        (
            {"structured_outputs": {}},
            "structured_outputs",
            "'structured_outputs' has neither 'regex' nor 'json'. Send one of them.",
        ),
        (
            {"structured_outputs": {"regex": "a", "json": {}}},
            "structured_outputs",
            "'structured_outputs' has both 'regex' and 'json'. Send one of them.",
        ),
        (
            {"structured_outputs": {"choice": ["a", "b"]}},
            "structured_outputs.choice",
            "Field 'structured_outputs.choice' with the value ['a', 'b'] is not supported by this server. "
            "Leave it out (or send None).",
        ),
        (
            {"structured_outputs": {"json": "{'a'}"}},
            "structured_outputs.json",
            "The text in 'structured_outputs.json' is no JSON: Expecting property name enclosed in double quotes: "
            "line 1 column 2 (char 1). Send a JSON schema, as object or text.",
        ),
        (
            {"structured_outputs": {"json": "[1]"}},
            "structured_outputs.json",
            "The text in 'structured_outputs.json' is no JSON object. Send a JSON schema, as object or text.",
        ),
        (
            {"structured_outputs": {"json": "[" * 100_000}},
            "structured_outputs.json",
            "The text in 'structured_outputs.json' is no JSON: maximum recursion depth exceeded",
        ),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "text"}},
            "structured_outputs",
            "'response_format' and 'structured_outputs' are both set. Send one of them.",
        ),
        ({"guided_regex": "a"}, "guided_regex", "Unknown field 'guided_regex'."),
    ],
)
def test_forms_of_the_answer_that_are_wrong_are_refused_by_name(
    client: httpx.Client, fields: dict, param: str, message: str
) -> None:
    got = _chat_error(client, **fields)
    assert got[0].startswith(message)
    assert got[1] == param
