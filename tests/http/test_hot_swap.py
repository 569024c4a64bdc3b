"""Publish v2, move `stable`, and the running server serves v2: no failed request, no stale or mixed answer."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from adapterhub.store import Store
from server.engine.build import build_engine
from server.http import create_app
from tests.support.adapters import write_adapter
from tests.support.live_server import live_server

_SEEDS = (2, 5)  # Their greedy answers are long and differ from the start.
BODY = {"adapter": "swap", "prompt": "hello", "max_tokens": 8, "temperature": 0}


@dataclass
class Traffic:
    """Requests in a loop in one thread: (time sent, status, digest of the header, text)."""

    client: httpx.Client
    answers: list[tuple[float, int, str, str]] = field(default_factory=list)
    is_over: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        while not self.is_over.is_set():
            sent = time.monotonic()
            response = self.client.post("/v1/completions", json=BODY)
            text = response.json()["choices"][0]["text"] if response.status_code == 200 else response.text
            self.answers.append((sent, response.status_code, response.headers.get("x-adapter-digest", ""), text))


def _text(client: httpx.Client, adapter: str, max_tokens: int = 8) -> str:
    response = client.post("/v1/completions", json=BODY | {"adapter": adapter, "max_tokens": max_tokens})
    return response.json()["choices"][0]["text"]


@pytest.mark.parametrize("num_slots", [1, 4])
def test_moving_stable_under_load_is_seen_within_a_second_and_fails_nothing(
    lab, tmp_path: Path, num_slots: int
) -> None:
    folders = [write_adapter(tmp_path / f"v{idx}", lab.base, method="lora", rank=4, seed=idx) for idx in _SEEDS]
    with Store.open(tmp_path / "store") as store:
        v1 = store.publish(folders[0], task="swap", base=lab.base)
        app = create_app(build_engine(lab.base, num_slots=num_slots, kv_memory_mib=8), store, lab.base, lab.tokenizer)
        with live_server(app) as url, httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
            expected_v1 = _text(client, "swap", max_tokens=200)
            traffic = Traffic(client)
            threads = [threading.Thread(target=traffic.run) for _ in range(3)]
            for thread in threads:
                thread.start()
            long_body = BODY | {"max_tokens": 200, "stream": True}
            with client.stream("POST", "/v1/completions", json=long_body) as stream:
                lines = stream.iter_lines()
                first = next(lines)
                v2 = store.publish(folders[1], task="swap", base=lab.base)
                moved = time.monotonic()
                store.set_alias("swap", "stable", "v2", expected_generation=1, actor="test", reason="test")
                returned = time.monotonic()
                events = [json.loads(line[6:]) for line in [first, *lines] if line.startswith("data: {")]
            finished = time.monotonic()
            time.sleep(0.5)
            traffic.is_over.set()
            for thread in threads:
                thread.join()
            digests = {v.label: f"sha256:{v.serving_digest}" for v in (v1, v2)}
            texts = {digest: _text(client, label) for label, digest in digests.items()}
    assert {status for _, status, _, _ in traffic.answers} == {200}
    assert all(text == texts[digest] for _, _, digest, text in traffic.answers)
    assert len(set(texts.values())) == 2
    before = [digest for sent, _, digest, _ in traffic.answers if sent < moved - 0.5]
    after = [digest for sent, _, digest, _ in traffic.answers if sent > returned]
    assert set(before) <= {digests["swap@v1"]}
    assert after
    assert set(after) == {digests["swap@v2"]}
    flip = min(sent for sent, _, digest, _ in traffic.answers if digest == digests["swap@v2"])
    assert flip - moved < 1
    assert flip < finished  # The stream of v1 was still in flight.
    assert "".join(event["choices"][0]["text"] for event in events) == expected_v1
    assert {event["adapter"]["version"] for event in events} == {1}
    assert events[-1]["choices"][0]["finish_reason"] == "length"
