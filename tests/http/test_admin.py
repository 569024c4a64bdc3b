"""`/admin/v1/adapters`: load, unload, effect, residency; and `hub adapters show`, which prints what was measured."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from adapterhub.cli.main import app
from adapterhub.records import EffectReport
from adapterhub.store import Store
from server.engine.build import build_engine
from server.engine.engine import NativeEngine
from server.http import create_app
from tests.support.adapters import write_adapter
from tests.support.fake_runner import FakeRunner
from tests.support.live_server import live_server

ADMIN = "/admin/v1/adapters"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ADAPTERHUB_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def store(lab, home: Path, tmp_path: Path) -> Iterator[Store]:
    with Store.open(home / "store") as store:
        for task, strength in (("summarize", 1.0), ("silent", 1e-12)):
            adapter = write_adapter(tmp_path / task, lab.base, method="lora", rank=2, strength=strength)
            store.publish(adapter, task=task, base=lab.base)
        yield store


@pytest.fixture
def client(lab, store: Store) -> Iterator[httpx.Client]:
    engine = build_engine(lab.base, num_slots=1, kv_memory_mib=8)
    with (
        live_server(create_app(engine, store, lab.base, lab.tokenizer)) as url,
        httpx.Client(base_url=url, timeout=60, trust_env=False) as client,
    ):
        yield client


def _error(response: httpx.Response, status: int) -> dict[str, str]:
    assert response.status_code == status, response.text
    return response.json()["error"]


def _show(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["adapters", "show", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.stdout


def test_loading_returns_the_effect_and_the_store_keeps_it(client: httpx.Client, store: Store) -> None:
    digest = store.get_version("summarize").serving_digest
    reply = client.post(f"{ADMIN}/summarize@stable/load").json()
    assert (reply["adapter"], reply["digest"]) == ("summarize@v1", f"sha256:{digest}")
    effect = EffectReport.model_validate(reply["effect"])
    assert len(effect.modules) == 14
    assert 0 < effect.median_relative_size <= effect.max_relative_size
    assert effect.probe is not None
    assert effect.probe.kl > 0
    assert client.get(f"{ADMIN}/sha256:{digest}/effect").json() == reply
    assert client.post(f"{ADMIN}/summarize/load").json() == reply
    assert store.find_effect(digest) == effect


def test_residency_names_what_is_loaded_and_where(client: httpx.Client, store: Store) -> None:
    assert client.get(ADMIN).json() == {"data": []}
    client.post(f"{ADMIN}/summarize/load").raise_for_status()
    mix = {"prompt": "x", "max_tokens": 1, "adapter": {"mix": {"summarize": 0.5}}}
    mixed = client.post("/v1/completions", json=mix).headers["x-adapter-digest"]
    digest = f"sha256:{store.get_version('summarize').serving_digest}"
    found = {one["digest"]: one for one in client.get(ADMIN).json()["data"]}
    assert found == {
        digest: {"digest": digest, "tier": "host", "labels": ["summarize@v1"]},
        mixed: {"digest": mixed, "tier": "device", "labels": []},
    }


def test_an_unloaded_adapter_is_gone_until_it_is_asked_for_again(client: httpx.Client, store: Store) -> None:
    digest = f"sha256:{store.get_version('summarize').serving_digest}"
    asked = {"prompt": "x", "max_tokens": 4, "temperature": 0, "adapter": "summarize"}
    answer = client.post("/v1/completions", json=asked).raise_for_status().json()["choices"]
    reply = client.post(f"{ADMIN}/summarize@stable/unload").raise_for_status()
    assert reply.json() == {"adapter": "summarize@v1", "digest": digest}
    assert client.get(ADMIN).json() == {"data": []}
    assert client.post(f"{ADMIN}/{digest}/unload").raise_for_status().json() == reply.json()  # Nothing was loaded.
    assert client.post("/v1/completions", json=asked).json()["choices"] == answer
    assert [one["digest"] for one in client.get(ADMIN).json()["data"]] == [digest]


def test_an_adapter_in_use_stays_loaded_until_its_request_has_ended(lab) -> None:
    engine = NativeEngine(FakeRunner(step_s=0.02), lab.tokenizer, lab.base)
    asked = {"prompt": "x", "max_tokens": 100, "ignore_eos": True, "adapter": "summarize@v1"}
    with (
        live_server(create_app(engine, lab.store, lab.base, lab.tokenizer)) as url,
        httpx.Client(base_url=url, timeout=60, trust_env=False) as client,
        ThreadPoolExecutor() as pool,
    ):
        answer = pool.submit(client.post, "/v1/completions", json=asked)
        while "device" not in [one["tier"] for one in client.get(ADMIN).json()["data"]]:
            time.sleep(0.01)
        error = _error(client.post(f"{ADMIN}/summarize@v1/unload"), 409)
        assert error["message"] == (
            "Adapter 'summarize@v1' stays loaded: requests use it or wait for it. Try again when they have ended."
        )
        assert (error["param"], error["code"]) == ("ref", "conflict")
        assert [one["labels"] for one in client.get(ADMIN).json()["data"]] == [["summarize@v1"]]
        assert answer.result().json()["usage"]["completion_tokens"] == 100
        while engine.status().num_running:
            time.sleep(0.01)
        client.post(f"{ADMIN}/summarize@v1/unload").raise_for_status()
        assert client.get(ADMIN).json() == {"data": []}


def test_names_that_mean_no_adapter_are_refused(client: httpx.Client) -> None:
    for method, action in (("POST", "load"), ("POST", "unload"), ("GET", "effect")):
        error = _error(client.request(method, f"{ADMIN}/sumarize/{action}"), 404)
        assert error["message"] == "No adapter 'sumarize' among 2 published. Did you mean 'summarize'?"
        assert (error["param"], error["code"]) == ("ref", "adapter_not_found")
        error = _error(client.request(method, f"{ADMIN}/base/{action}"), 400)
        assert error["message"] == "'base' is always loaded. Name an adapter."


def test_an_adapter_of_another_base_is_not_loaded(lab, serve) -> None:
    with serve(lab.engine()) as client:
        for action in ("load", "unload"):
            assert _error(client.post(f"{ADMIN}/foreign/{action}"), 409)["code"] == "base_mismatch"


def test_an_effect_that_was_not_measured_yet_says_how_to_measure_it(client: httpx.Client) -> None:
    error = _error(client.get(f"{ADMIN}/summarize/effect"), 404)
    assert error["message"] == (
        "The effect of 'summarize@v1' has not been measured yet. "
        "Load it with POST /admin/v1/adapters/summarize@v1/load."
    )


def test_an_adapter_too_weak_to_matter_is_an_error_and_nothing_is_kept(client: httpx.Client, store: Store) -> None:
    error = _error(client.post(f"{ADMIN}/silent/load"), 503)
    assert error["code"] == "adapter_load_failed"
    assert error["message"].startswith("With adapter 'silent@v1' the next token after ")
    assert store.find_effect(store.get_version("silent").serving_digest) is None


def test_an_adapter_that_cannot_be_loaded_says_why(lab, serve) -> None:
    digest = lab.store.get_version("boolq").serving_digest
    with serve(lab.engine(broken=[digest])) as client:
        error = _error(client.post(f"{ADMIN}/boolq/load"), 503)
    assert error["message"] == "Adapter 'boolq@v1' cannot be loaded: it is broken. Publish it again."


def test_show_prints_what_was_measured(client: httpx.Client) -> None:
    assert "not measured; POST /admin/v1/adapters/summarize@v1/load on a server does it" in _show("summarize")
    assert json.loads(_show("summarize", "--json"))["effect"] is None
    effect = client.post(f"{ADMIN}/summarize/load").json()["effect"]
    assert json.loads(_show("summarize", "--json"))["effect"] == effect
    shown = _show("summarize")
    assert "14 linears changed, 0 left alone" in shown
    assert f"{effect['total_relative_size']:.2%} of the base in all" in shown
    assert f"KL {effect['probe']['kl']:.4g} nats" in shown
