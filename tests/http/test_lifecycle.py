"""Requests that do not end as planned: failures midway, clients that leave, full queues, shutdown."""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Callable

import httpx
import pytest

from server.engine.fake import FakeEngine
from server.engine.types import EngineStatus
from server.http import create_app
from tests.support.live_server import live_server

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "hi"}], "adapter": "summarize"}


def _wait_for(condition: Callable[[], object], timeout_s: float = 5) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_failure_midway_is_an_error_event_and_no_done(lab, serve) -> None:
    with serve(lab.engine(fail_after=3)) as client:
        text = client.post(CHAT, json=BODY | {"stream": True}).text
    last = text.strip().split("\n\n")[-1]
    assert "[DONE]" not in text
    assert 'finish_reason":"' not in text
    assert json.loads(last.removeprefix("data: ")) == {
        "error": {
            "message": "The engine broke after 3 tokens. Send it again.",
            "type": "server_error",
            "param": None,
            "code": "internal",
        }
    }


def test_a_failure_before_the_first_token_has_its_own_status_even_for_a_stream(lab, serve) -> None:
    digest = lab.store.get_version("summarize").serving_digest
    with serve(lab.engine(broken=[digest])) as client:
        for stream in (False, True):
            response = client.post(CHAT, json=BODY | {"stream": stream})
            assert response.status_code == 503
            assert response.json()["error"] == {
                "message": "Adapter 'summarize@v1' cannot be loaded: it is broken. Publish it again.",
                "type": "server_error",
                "param": None,
                "code": "adapter_load_failed",
            }
        assert client.post(CHAT, json=BODY | {"adapter": "boolq"}).status_code == 200


def test_a_failure_before_anything_was_sent_has_its_own_status_even_after_a_silent_token(lab, serve) -> None:
    with serve(lab.engine(fail_after=1)) as client:
        body = {"prompt": "x", "stream": True, "stop": ["[x"]}  # The first token, "[", is held back.
        response = client.post("/v1/completions", json=body)
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "The engine broke after 1 tokens. Send it again."


def test_a_failure_midway_of_a_whole_answer_is_an_error_and_no_answer(lab, serve) -> None:
    engine = lab.engine(fail_after=3)
    with serve(engine) as client:
        response = client.post(CHAT, json=BODY | {"n": 3})
        assert response.status_code == 500
        assert response.json()["error"]["message"] == "The engine broke after 3 tokens. Send it again."
        _wait_for(lambda: not engine.running)


def test_an_unexpected_error_is_logged_and_hides_its_details(lab, serve, caplog: pytest.LogCaptureFixture) -> None:
    class Surprised(FakeEngine):
        async def generate(self, request):
            raise ZeroDivisionError(f"secret of {request.request_id}")
            yield

    engine = Surprised(lab.tokenizer, lambda _: [1])
    with serve(engine) as client, caplog.at_level(logging.ERROR):
        response = client.post(CHAT, json=BODY, headers={"x-request-id": "r-9"})
    assert response.status_code == 500
    assert response.json()["error"]["message"] == ("The engine made a mistake. Report request 'r-9-0-0' with its log.")
    assert "secret" in caplog.text


def test_a_mistake_of_a_route_is_reported_with_the_request_id(lab, serve, monkeypatch) -> None:
    def broken(_: object) -> None:
        raise ZeroDivisionError("secret")

    with serve(lab.engine()) as client:
        monkeypatch.setattr(lab.store, "get_version", broken)
        response = client.post(CHAT, json=BODY, headers={"x-request-id": "r-8"})
    assert response.status_code == 500
    assert response.headers["x-request-id"] == "r-8"
    assert response.json()["error"]["message"] == "The server made a mistake. Report request 'r-8' with its log."


def _leave_midway(url: httpx.URL, body: dict, engine: FakeEngine, request_id: str) -> None:
    data = json.dumps(body).encode()
    lines = (
        f"POST {CHAT} HTTP/1.1",
        "host: x",
        "content-type: application/json",
        f"x-request-id: {request_id}",
        f"content-length: {len(data)}",
    )
    with socket.create_connection((url.host, url.port)) as connection:
        connection.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + data)
        _wait_for(lambda: f"{request_id}-0-0" in engine.running)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_its_generation(lab, serve, stream: bool) -> None:
    engine = lab.engine(step_s=0.05)
    with serve(engine) as client:
        _leave_midway(client.base_url, BODY | {"stream": stream, "n": 2}, engine, "gone")
        _wait_for(lambda: not engine.running, timeout_s=1)
    assert len(engine.cancelled) == 2


def test_a_disconnect_storm_leaves_nothing_running(lab, serve) -> None:
    engine = lab.engine(step_s=0.02, max_requests=200)
    with serve(engine) as client:
        for idx in range(20):
            _leave_midway(client.base_url, BODY | {"stream": idx % 2 == 0}, engine, f"gone{idx}")
        _wait_for(lambda: not engine.running)
        assert client.post(CHAT, json=BODY | {"max_tokens": 2}).status_code == 200
    assert len(engine.cancelled) == 20


def test_a_full_queue_is_503_with_retry_after(lab, serve) -> None:
    with serve(lab.engine(max_requests=0)) as client:
        for stream in (False, True):
            response = client.post(CHAT, json=BODY | {"stream": stream})
            assert response.status_code == 503
            assert response.headers["retry-after"] == "1"
            assert response.json()["error"]["code"] == "overloaded"
            assert response.json()["error"]["message"] == "All 0 places are taken. Try again later."


def test_a_draining_server_is_alive_but_not_ready_and_takes_nothing_new(lab) -> None:
    app = create_app(lab.engine(), lab.store, lab.base, lab.tokenizer)
    with live_server(app) as url, httpx.Client(base_url=url, trust_env=False) as client:
        app.state.service.is_draining = True
        assert client.get("/health/live").status_code == 200
        assert client.get("/health/startup").status_code == 200
        assert client.get("/health/ready").status_code == 503
        assert client.get("/health/ready").json() == {"status": "draining"}
        response = client.post(CHAT, json=BODY)
        assert response.status_code == 503
        assert response.json()["error"]["message"] == (
            "The server is shutting down. Send the request to another server, or again later."
        )


def test_an_engine_that_stopped_is_not_ready(lab, serve) -> None:
    class Asleep(FakeEngine):
        async def start(self) -> None:
            pass

    with serve(Asleep(lab.tokenizer, lambda _: [1])) as client:
        assert client.get("/health/ready").status_code == 503
        assert client.get("/health/ready").json() == {"status": "not ready"}
        assert client.get("/health/startup").status_code == 503


def test_an_engine_that_died_is_not_alive(lab, serve) -> None:
    class Dead(FakeEngine):
        def status(self) -> EngineStatus:
            return EngineStatus(is_ready=False, is_alive=False, num_running=0, num_waiting=0, retry_after_s=1)

    with serve(Dead(lab.tokenizer, lambda _: [1])) as client:
        assert client.get("/health/live").status_code == 503
        assert client.get("/health/live").json() == {"status": "dead"}


def test_a_moved_alias_is_used_by_the_next_request_and_loaded_ahead(lab, serve) -> None:
    engine = lab.engine()
    with serve(engine) as client:
        _wait_for(lambda: client.get("/health/ready").status_code == 200)
        time.sleep(0.3)  # The watcher has seen where the aliases stand.
        target = lab.store.get_version("summarize@v2").serving_digest
        assert target not in engine.resident()
        lab.store.set_alias("summarize", "next", "v2", expected_generation=None, actor="test", reason="test")
        assert client.post(CHAT, json=BODY | {"adapter": "summarize@next"}).headers["x-adapter-version"] == (
            "summarize@v2"
        )
        _wait_for(lambda: target in engine.resident(), timeout_s=1)


def test_an_alias_moved_to_an_adapter_that_cannot_be_loaded_is_logged_and_holds_up_no_other(
    lab, serve, caplog: pytest.LogCaptureFixture
) -> None:
    broken = lab.store.get_version("summarize@v2").serving_digest
    fine = lab.store.get_version("boolq").serving_digest
    engine = lab.engine(broken=[broken])
    with serve(engine) as client, caplog.at_level(logging.WARNING):
        _wait_for(lambda: client.get("/health/ready").status_code == 200)
        time.sleep(0.3)  # The watcher has seen where the aliases stand.
        for task, version in (("summarize", "v2"), ("boolq", "v1"), ("foreign", "v1")):
            lab.store.set_alias(task, "watched", version, expected_generation=None, actor="test", reason="test")
        _wait_for(lambda: fine in engine.resident(), timeout_s=1)
        _wait_for(lambda: "summarize@watched" in caplog.text, timeout_s=1)
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "server.http.watcher"]
    assert warning == (
        "'summarize@watched' points to an adapter that cannot be loaded ahead: "
        "Adapter 'summarize@v2' cannot be loaded: it is broken. Publish it again."
    )
