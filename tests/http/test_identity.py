"""The same name with other content is another adapter: nothing computed or written for one serves the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapterhub.store import Store
from server.engine.build import build_engine
from server.http import create_app
from tests.support.adapters import write_adapter
from tests.support.live_server import live_server

PROMPT = "All requests begin with the same words, which fill several blocks of keys and values. " * 2
WIDE: dict[str, Any] = {"method": "lora", "rank": 24, "seed": 1}
FOLLOWERS: dict[str, dict[str, Any]] = {
    "other values": {"method": "lora", "rank": 24, "seed": 2},
    "fewer ranks": {"method": "lora", "rank": 2, "seed": 3},
    "fewer modules": {"method": "lora", "rank": 3, "seed": 4, "target_modules": ["q_proj"]},
    "one layer": {"method": "vera", "rank": 5, "seed": 5, "layers_to_transform": [1], "layers_pattern": "layers"},
    "no ranks": {"method": "ia3", "seed": 6},
}
Answer = tuple[str, str, list[float | None], int]


@contextmanager
def serving(lab, store: Store) -> Iterator[httpx.Client]:
    """A server with one slot, which every adapter must share."""
    app = create_app(build_engine(lab.base, num_slots=1, kv_memory_mib=8), store, lab.base, lab.tokenizer)
    with live_server(app) as url, httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        yield client


def ask(client: httpx.Client, adapter: object) -> Answer:
    """Return digest, text, log probabilities and the number of cached prompt tokens."""
    body = {"adapter": adapter, "prompt": PROMPT, "max_tokens": 6, "temperature": 0, "logprobs": 1}
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    reply = response.json()
    (choice,) = reply["choices"]
    num_cached = reply["usage"]["prompt_tokens_details"]["cached_tokens"]
    return response.headers["x-adapter-digest"], choice["text"], choice["logprobs"]["token_logprobs"], num_cached


@pytest.mark.parametrize(
    ("follower", "is_mix"),
    [(name, is_mix) for is_mix in (False, True) for name in FOLLOWERS if not (is_mix and name == "no ranks")],
)
def test_the_next_version_of_a_name_answers_as_on_a_fresh_server(
    lab, tmp_path: Path, follower: str, is_mix: bool
) -> None:
    name: object = {"mix": {"task": 0.75}} if is_mix else "task"
    with Store.open(tmp_path / "store") as store:
        for number, spec in enumerate((WIDE, FOLLOWERS[follower])):
            store.publish(write_adapter(tmp_path / f"{number}", lab.base, **spec), task="task", base=lab.base)
        with serving(lab, store) as client:
            v1 = [ask(client, name) for _ in range(2)]
            store.point_alias("task@stable", "v2", actor="test", reason="test")
            v2 = [ask(client, name) for _ in range(2)]
            store.point_alias("task@stable", "v1", actor="test", reason="test")
            v1.append(ask(client, name))
            store.point_alias("task@stable", "v2", actor="test", reason="test")
        with serving(lab, store) as client:
            cold = ask(client, name)
    digests, texts = {one[0] for one in v1}, {one[1] for one in v1}
    assert len(digests) == len(texts) == 1
    assert not digests & {one[0] for one in v2}
    assert [one[3] > 0 for one in v1] == [False, True, True]
    assert [one[3] > 0 for one in v2] == [False, True]
    assert v2[0] == cold
    assert v2[1][:3] == cold[:3]
    assert v2[0][2] != v1[0][2]
