"""What `{"mix": {...}}` answers with, and what it is refused for."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import pytest

from adapterhub.store import Store
from server.engine.build import build_engine
from server.http import create_app
from tests.support.adapters import write_adapter
from tests.support.live_server import live_server

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 40, "temperature": 0}
RANGE = "from -8 to 8 whose size is at least 0.0001."


@pytest.fixture(scope="module")
def store(lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """One version of every method; `summarize` and `ask` also exist with wide ranks; `twin` has the bytes of `ask`."""
    folder = tmp_path_factory.mktemp("mixes")
    with Store.open(folder / "store") as store:
        for idx, (task, method, rank) in enumerate(
            [
                ("summarize", "lora", 2),
                ("ask", "adalora", 3),
                ("draw", "vera", 5),
                ("shift", "ia3", 0),
                ("turn", "dora", 2),
                ("wide", "lora", 600),
                ("broad", "lora", 600),
            ]
        ):
            adapter = write_adapter(folder / task, lab.base, method=method, rank=rank, seed=idx)
            store.publish(adapter, task=task, base=lab.base)
        store.publish(folder / "ask", task="twin", base=lab.base)
        yield store


@pytest.fixture(scope="module")
def client(lab, store: Store) -> Iterator[httpx.Client]:
    """A server that really computes."""
    engine = build_engine(lab.base, num_slots=2, kv_memory_mib=8)
    with (
        live_server(create_app(engine, store, lab.base, lab.tokenizer)) as url,
        httpx.Client(base_url=url, timeout=60, trust_env=False) as client,
    ):
        yield client


def _ask(client: httpx.Client, adapter: object, **fields: object) -> httpx.Response:
    response = client.post(CHAT, json=BODY | {"adapter": adapter} | fields)
    assert response.status_code == 200, response.text
    return response


def _text(client: httpx.Client, adapter: object) -> str:
    return _ask(client, adapter).json()["choices"][0]["message"]["content"]


def _refusal(client: httpx.Client, mix: object, status: int = 400) -> tuple[str, str, str]:
    response = client.post(CHAT, json=BODY | {"adapter": {"mix": mix}})
    assert response.status_code == status, response.text
    error = response.json()["error"]
    return error["message"], error["param"], error["code"]


def test_a_mix_answers_and_names_its_members_with_digests_and_weights(client: httpx.Client, store: Store) -> None:
    response = _ask(client, {"mix": {"summarize": 0.7, "ask@v1": -0.3}})
    digests = {task: f"sha256:{store.get_version(task).serving_digest}" for task in ("summarize", "ask")}
    reply = response.json()
    assert reply["model"] == response.headers["x-adapter-version"] == "mix(ask@v1:-0.3,summarize@v1:0.7)"
    assert reply["adapter"] == {
        "task": "mix",
        "version": None,
        "digest": response.headers["x-adapter-digest"],
        "members": [
            {"task": "ask", "version": 1, "digest": digests["ask"], "weight": -0.3},
            {"task": "summarize", "version": 1, "digest": digests["summarize"], "weight": 0.7},
        ],
    }
    assert response.headers["x-adapter-digest"] not in digests.values()


def test_equal_mixes_have_one_digest_however_they_are_written(client: httpx.Client) -> None:
    def digest(mix: dict[str, float]) -> str:
        return _ask(client, {"mix": mix}, max_tokens=1).headers["x-adapter-digest"]

    first = digest({"summarize": 2, "ask": 0.5})
    assert digest({"ask@stable": 0.5, "summarize@v1": 2.0}) == first
    assert digest({"summarize": 2, "ask": 0.25, "twin": 0.25}) == first
    assert digest({"summarize": 0.5, "ask": 2}) != first


def test_each_member_changes_the_answer(client: httpx.Client) -> None:
    answers = {_text(client, {"mix": {"summarize": 1, "ask": weight}}) for weight in (1, -1, 0.5)}
    answers |= {_text(client, name) for name in ("summarize", "ask", "base")}
    assert len(answers) == 6


@pytest.mark.parametrize("name", ["summarize", "shift", "turn"])
def test_one_adapter_of_weight_one_is_that_adapter(client: httpx.Client, name: str) -> None:
    mixed, alone = _ask(client, {"mix": {name: 1}}), _ask(client, name)
    assert mixed.json()["adapter"] == alone.json()["adapter"]
    assert mixed.headers["x-adapter-version"] == f"{name}@v1"
    assert mixed.json()["choices"] == alone.json()["choices"]


def test_names_of_one_adapter_add_up(client: httpx.Client) -> None:
    response = _ask(client, {"mix": {"ask": 0.7, "twin": 0.3}})
    assert response.headers["x-adapter-version"] == "ask@v1"


def test_a_mix_streams_under_its_name(client: httpx.Client) -> None:
    mix = {"mix": {"summarize": 0.5, "draw": 1.5}}
    whole = _ask(client, mix)
    with client.stream("POST", CHAT, json=BODY | {"adapter": mix, "stream": True}) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    chunks = [json.loads(line) for line in lines[:-1]]
    assert response.headers["x-adapter-digest"] == whole.headers["x-adapter-digest"]
    assert all(chunk["adapter"] == whole.json()["adapter"] for chunk in chunks)
    streamed = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert streamed == whole.json()["choices"][0]["message"]["content"]


def test_plain_completions_take_a_mix_too(client: httpx.Client) -> None:
    body = {"prompt": "x", "adapter": {"mix": {"summarize": 0.5, "ask": 0.5}}}
    response = client.post("/v1/completions", json=body)
    assert response.headers["x-adapter-version"] == "mix(ask@v1:0.5,summarize@v1:0.5)"


@pytest.mark.parametrize("weight", [0, 0.0, 1e-5, -1e-50, 8.5, -9, "0.7", True, None, [1], 10**400])
def test_a_weight_must_be_a_number_of_moderate_size(client: httpx.Client, weight: object) -> None:
    message, param, code = _refusal(client, {"summarize": 0.5, "ask": weight})
    assert message == f"In the mix, 'ask' has the weight {weight!r}. Give a number {RANGE}"
    assert (param, code) == ("adapter.mix", "invalid_request")


@pytest.mark.parametrize(("written", "shown"), [("NaN", "nan"), ("Infinity", "inf"), ("-Infinity", "-inf")])
def test_a_weight_that_is_not_finite_is_refused(client: httpx.Client, written: str, shown: str) -> None:
    body = json.dumps(BODY | {"adapter": {"mix": {"ask": 0}}}).replace('{"ask": 0}', f'{{"ask": {written}}}')
    response = client.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert shown in response.json()["error"]["message"].lower()


def test_a_mix_is_an_object_of_one_to_eight_names(client: httpx.Client) -> None:
    rule = 'Send {"mix": {name: weight, ...}} with 1 to 8 names.'
    assert _refusal(client, ["summarize"])[0] == f"The mix is ['summarize'], not an object. {rule}"
    assert _refusal(client, {})[0] == f"The mix names 0 adapters. {rule}"
    assert _refusal(client, {f"a{idx}": 1 for idx in range(9)})[0] == f"The mix names 9 adapters. {rule}"


def test_a_mix_names_published_adapters_of_this_base(client: httpx.Client) -> None:
    message, param, code = _refusal(client, {"summarize": 1, "sumarize": 1}, 404)
    assert message == "No adapter 'sumarize' among 8 published. Did you mean 'summarize'?"
    assert (param, code) == ("adapter.mix.sumarize", "adapter_not_found")
    assert _refusal(client, {"base": 0.5})[0] == (
        "The mix gives 'base' a weight. Leave it out: the base always takes part, with weight 1."
    )


def test_a_member_of_another_base_is_refused(lab, serve) -> None:
    with serve(lab.engine()) as client:
        message, param, code = _refusal(client, {"summarize": 1, "foreign": 1}, 409)
    assert message.startswith("Adapter 'foreign@v1' was made for base ")
    assert (param, code) == ("adapter.mix.foreign", "base_mismatch")


@pytest.mark.parametrize(("name", "method"), [("shift", "ia3"), ("turn", "dora")])
@pytest.mark.parametrize("rest", [{}, {"summarize": 1}])
def test_methods_without_a_sum_are_refused_by_name(client: httpx.Client, name: str, method: str, rest: dict) -> None:
    message, param, code = _refusal(client, {name: 0.5} | rest)
    assert message == (
        f"In the mix, '{name}@v1' is of method {method}: it scales what the base computes, so no weighted sum with it "
        f'is defined. Send "adapter": "{name}@v1" to use it alone, or mix adapters of lora, adalora and vera.'
    )
    assert (param, code) == ("adapter.mix", "unsupported_field")


@pytest.mark.parametrize(("weights", "total"), [((1, -1), "0"), ((5, 6), "11")])
def test_names_of_one_adapter_must_add_up_to_a_weight(client: httpx.Client, weights: tuple, total: str) -> None:
    assert _refusal(client, dict(zip(("ask", "twin"), weights, strict=True)))[0] == (
        f"In the mix, 'ask', 'twin' are all 'ask@v1'; their weights add up to {total}. "
        f"Let them add up to a number {RANGE}"
    )


def test_a_mix_of_too_many_ranks_is_refused(client: httpx.Client) -> None:
    message, param, _ = _refusal(client, {"wide": 0.5, "broad": 0.5})
    assert message == (
        "The members of the mix have rank 1200 together in 'model.layers.0.mlp.down_proj'; the limit is 1024. "
        "Mix fewer adapters, or adapters of lower rank."
    )
    assert param == "adapter.mix"
    assert _ask(client, {"mix": {"wide": 0.5, "summarize": 0.5}}).status_code == 200


def test_a_mix_and_a_model_that_differ_are_a_conflict(client: httpx.Client) -> None:
    body = BODY | {"adapter": {"mix": {"summarize": 0.5}}, "model": "summarize"}
    error = client.post(CHAT, json=body).json()["error"]
    assert error["message"] == (
        "'adapter' {'mix': {'summarize': 0.5}} is 'mix(summarize@v1:0.5)', but 'model' 'summarize' is 'summarize@v1'. "
        "Send one of them; 'model' may always be 'tiny-llama'."
    )


def test_models_lists_no_mix(client: httpx.Client) -> None:
    _ask(client, {"mix": {"summarize": 0.5, "ask": 0.5}})
    assert not [card for card in client.get("/v1/models").json()["data"] if "mix" in card["id"]]


def test_a_mix_never_reads_what_another_mix_or_a_member_computed(client: httpx.Client) -> None:
    messages = [{"role": "user", "content": "a prompt of several blocks of sixteen tokens each"}]
    choices = ["summarize", {"mix": {"summarize": 0.6, "ask": 0.4}}, {"mix": {"summarize": 0.6, "ask": -0.4}}, "ask"]
    cached, answers = [], []
    for adapter in choices * 2:
        reply = _ask(client, adapter, messages=messages).json()
        cached.append(reply["usage"]["prompt_tokens_details"]["cached_tokens"])
        answers.append(reply["choices"][0]["message"]["content"])
    assert cached[:4] == [0] * 4
    assert all(num_tokens >= 48 for num_tokens in cached[4:])
    assert answers[:4] == answers[4:]
    assert len(set(answers)) == 4
