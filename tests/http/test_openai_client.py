"""The official OpenAI client, unchanged, against a real server with a tiny model and adapters of several kinds."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import openai
import pytest

from adapterhub.store import Store
from server.engine.build import build_engine
from server.http import create_app
from tests.support.adapters import write_adapter
from tests.support.live_server import live_server

HELLO = [{"role": "user", "content": "hi"}]
TASKS = {"lora-task": "lora", "dora-task": "dora", "ia3-task": "ia3"}


@pytest.fixture(scope="module")
def url(lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("openai")
    with Store.open(folder / "store") as store:
        for task, method in TASKS.items():
            adapter = write_adapter(folder / task, lab.base, method=method, rank=4)
            store.publish(adapter, task=task, base=lab.base)
        engine = build_engine(lab.base, num_slots=2, kv_memory_mib=8)
        with live_server(create_app(engine, store, lab.base, lab.tokenizer)) as url:
            yield url


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def _ask(client: openai.OpenAI, adapter: str, **options) -> str:
    options = {"max_tokens": 12, "temperature": 0} | options
    reply = client.chat.completions.create(
        model="tiny-llama", messages=HELLO, extra_body={"adapter": adapter}, **options
    )
    return reply.choices[0].message.content


def test_chat_names_the_adapter_in_body_and_headers(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(model="dora-task", messages=HELLO, max_tokens=5, seed=1)
    reply = raw.parse()
    assert reply.choices[0].finish_reason in ("length", "stop")
    assert reply.usage.completion_tokens <= 5
    assert reply.model == "dora-task@v1"
    assert reply.model_extra["adapter"]["task"] == "dora-task"
    assert raw.headers["x-adapter-digest"] == reply.model_extra["adapter"]["digest"]


def test_a_stream_gives_the_same_text_as_a_whole_answer(client: openai.OpenAI) -> None:
    whole = _ask(client, "lora-task", max_tokens=30)
    stream = client.chat.completions.create(
        model="lora-task",
        messages=HELLO,
        max_tokens=30,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole
    assert chunks[-1].usage.total_tokens == chunks[-1].usage.prompt_tokens + chunks[-1].usage.completion_tokens
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] in ("length", "stop")


async def test_concurrent_requests_of_many_adapters_answer_as_each_does_alone(url: str, client: openai.OpenAI) -> None:
    names = [*TASKS, "base"]
    alone = {name: _ask(client, name) for name in names}
    assert len(set(alone.values())) == len(names)
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as many:

        async def ask(name: str) -> str:
            reply = await many.chat.completions.create(
                model="base", messages=HELLO, max_tokens=12, temperature=0, extra_body={"adapter": name}
            )
            return reply.choices[0].message.content

        answers = await asyncio.gather(*(ask(name) for name in names * 4))
        assert answers == [alone[name] for name in names * 4]
        stream = await many.completions.create(model="ia3-task", prompt="hi", max_tokens=5, temperature=0, stream=True)
        text = "".join([chunk.choices[0].text async for chunk in stream])
    assert text == client.completions.create(model="ia3-task", prompt="hi", max_tokens=5, temperature=0).choices[0].text


def test_seed_choices_and_log_probabilities(client: openai.OpenAI) -> None:
    options = {"model": "lora-task", "messages": HELLO, "max_tokens": 6, "n": 2, "seed": 3, "logprobs": True}
    first = client.chat.completions.create(**options, top_logprobs=3)
    again = client.chat.completions.create(**options, top_logprobs=3)
    assert [choice.message.content for choice in first.choices] == [choice.message.content for choice in again.choices]
    assert first.choices[0].message.content != first.choices[1].message.content
    scores = first.choices[0].logprobs.content
    assert all(score.logprob <= 0 and len(score.top_logprobs) == 3 for score in scores)
    assert all(score.top_logprobs[0].logprob >= score.logprob - 1e-6 for score in scores)
    plain = client.completions.create(model="base", prompt=["a", "b"], max_tokens=3, logprobs=2)
    assert [len(choice.logprobs.tokens) for choice in plain.choices] == [3, 3] or plain.choices
    assert len(plain.choices) == 2


def test_choices_with_a_seed_differ_repeat_and_stream_as_they_come_whole(client: openai.OpenAI) -> None:
    options = {"model": "dora-task", "prompt": "hi", "max_tokens": 10, "n": 3, "seed": 5, "temperature": 1.3}
    options |= {"presence_penalty": 0.5, "extra_body": {"top_k": 200, "min_p": 0.001, "repetition_penalty": 1.1}}
    whole = [choice.text for choice in client.completions.create(**options).choices]
    assert len(set(whole)) == 3
    assert [choice.text for choice in client.completions.create(**options).choices] == whole
    streamed = ["", "", ""]
    for chunk in client.completions.create(**options, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == whole
    assert [choice.text for choice in client.completions.create(**options | {"seed": 6}).choices] != whole


def test_penalties_and_cuts_reach_the_sampler(client: openai.OpenAI) -> None:
    greedy = client.completions.create(model="base", prompt="aaaa", max_tokens=40, temperature=0).choices[0].text
    narrow = {"model": "base", "prompt": "aaaa", "max_tokens": 40, "temperature": 2}
    for cut in ({"top_k": 1}, {"min_p": 1.0}):
        assert client.completions.create(**narrow, extra_body=cut).choices[0].text == greedy
    assert client.completions.create(**narrow, top_p=1e-9).choices[0].text == greedy
    for penalty in ({"presence_penalty": 2}, {"frequency_penalty": 2}):
        options = narrow | {"temperature": 0, "logprobs": 0} | penalty
        tokens = client.completions.create(**options).choices[0].logprobs.tokens
        plain = client.completions.create(**options | dict.fromkeys(penalty, 0)).choices[0].logprobs.tokens
        assert len(set(tokens)) / len(tokens) > len(set(plain)) / len(plain)


def test_usage_says_how_much_of_the_prompt_was_known(client: openai.OpenAI) -> None:
    options = {"model": "base", "prompt": "the same forty-eight characters of one prompt " * 2, "max_tokens": 2}
    client.completions.create(**options)
    usage = client.completions.create(**options).usage
    assert 0 < usage.prompt_tokens_details.cached_tokens < usage.prompt_tokens


def test_models_are_listed_and_retrieved(client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert names[0] == "tiny-llama"
    assert "lora-task@v1" in names
    assert client.models.retrieve("lora-task").model_extra["aliases"] == ["lora-task@stable"]


def test_errors_become_the_exceptions_of_the_client(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="Did you mean 'lora-task'") as missing:
        _ask(client, "lora-tusk")
    assert missing.value.code == "adapter_not_found"
    assert missing.value.param == "adapter"
    with pytest.raises(openai.BadRequestError, match="not supported by this server") as unsupported:
        client.chat.completions.create(model="base", messages=HELLO, logit_bias={"5": 1})
    assert unsupported.value.param == "logit_bias"
    with pytest.raises(openai.BadRequestError, match="the context of 'tiny-llama' has 512") as too_long:
        client.completions.create(model="base", prompt="x" * 600)
    assert too_long.value.code == "context_length_exceeded"


def test_a_failure_midway_raises_in_the_client(lab, serve) -> None:
    with (
        serve(lab.engine(fail_after=3)) as server,
        openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="x") as client,
    ):
        stream = client.chat.completions.create(model="base", messages=HELLO, stream=True)
        with pytest.raises(openai.APIError, match="The engine broke after 3 tokens"):
            list(stream)


def test_a_conflict_is_not_repeated_by_the_client(lab, serve) -> None:
    with serve(lab.engine()) as server, openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="x") as client:
        with pytest.raises(openai.ConflictError) as conflict:
            client.chat.completions.create(model="foreign", messages=HELLO)
        assert json.loads(conflict.value.request.content)["model"] == "foreign"
        assert conflict.value.request.headers["x-stainless-retry-count"] == "0"
