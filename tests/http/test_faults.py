"""Through HTTP and a real engine: what cannot be answered is one clear error, and nobody else notices."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapterhub.store import Store
from server.engine.build import build_engine
from server.engine.engine import NativeEngine
from server.engine.sequence import Limits
from server.http import create_app
from tests.support.adapters import write_adapter
from tests.support.engines import until
from tests.support.live_server import live_server

COMMON: dict[str, Any] = {"max_tokens": 12, "temperature": 0}
PLAIN = COMMON | {"prompt": "hello, this is fine", "logprobs": 0}
CHAT = COMMON | {"messages": [{"role": "user", "content": "hello"}]}
# The number of letters before "b" must be even and odd at once.
UNSATISFIABLE = {"allOf": [{"type": "string", "pattern": "^(aa)*b$"}, {"type": "string", "pattern": "^a(aa)*b$"}]}
FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": UNSATISFIABLE}}
FAULTS: dict[str, tuple[dict[str, Any], int, str, str]] = {
    "long": (PLAIN | {"adapter": "fine0", "prompt": "x" * 600}, 400, "context_length_exceeded", "has 600 tokens"),
    "empty": (PLAIN | {"adapter": "fine0", "prompt": ""}, 400, "invalid_request", "no tokens"),
    "form": (CHAT | {"adapter": "fine0", "response_format": FORM}, 400, "invalid_request", "Unsatisfiable schema"),
    "overflow": (CHAT | {"adapter": "loud"}, 500, "internal", "not finite with adapter 'loud@v1'"),
    "stuck1": (CHAT | {"adapter": "stuck1"}, 503, "adapter_load_failed", "takes longer than 2 s"),
    "stuck2": (PLAIN | {"adapter": "stuck2"}, 503, "adapter_load_failed", "takes longer than 2 s"),
    "deleted": (PLAIN | {"adapter": "gone"}, 503, "adapter_load_failed", "'gone@v1' cannot be loaded: Blob"),
}


@dataclass(frozen=True)
class World:
    """hanging: digests of adapters whose load hangs now."""

    client: httpx.AsyncClient
    engine: NativeEngine
    folder: Path
    hanging: list[str]


@pytest.fixture
async def world(lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    async with _world(lab, tmp_path, monkeypatch) as world:
        yield world


@asynccontextmanager
async def _world(lab, folder: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    """A server whose two turns to load can be taken by adapters that hang."""
    is_over, hanging = threading.Event(), list[str]()
    with Store.open(folder / "store") as store:
        stuck: set[str] = set()
        for idx, task in enumerate(("fine0", "fine1", "loud", "stuck1", "stuck2", "gone")):
            strength = 1e25 if task == "loud" else 1.0
            adapter = write_adapter(folder / task, lab.base, method="lora", rank=3, seed=idx, strength=strength)
            version = store.publish(adapter, task=task, base=lab.base)
            if task.startswith("stuck"):
                stuck.add(version.serving_digest)
        monkeypatch.setattr(Store, "view", _hanging(Store.view, stuck, hanging, is_over))
        engine = build_engine(lab.base, num_slots=4, kv_memory_mib=1, limits=Limits(load_timeout_s=2))
        with live_server(create_app(engine, store, lab.base, lab.tokenizer)) as url:
            async with httpx.AsyncClient(base_url=url, timeout=30, trust_env=False) as client:
                try:
                    yield World(client, engine, folder, hanging)
                finally:
                    is_over.set()


def _hanging(
    view: Callable[..., Path], stuck: set[str], hanging: list[str], is_over: threading.Event
) -> Callable[..., Path]:
    def opened(store: Store, digest: str) -> Path:
        if digest in stuck:
            hanging.append(digest)
            is_over.wait(30)
        return view(store, digest)

    return opened


async def _scores(client: httpx.AsyncClient, adapter: str) -> tuple[str, list[float | None]]:
    response = await client.post("/v1/completions", json=PLAIN | {"adapter": adapter})
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    return choice["text"], choice["logprobs"]["token_logprobs"]


@pytest.mark.parametrize("is_stream", [False, True])
async def test_each_fault_is_one_error_and_the_others_answer_as_alone(world: World, is_stream: bool) -> None:
    names = ("base", "fine0", "fine1")
    alone = {name: await _scores(world.client, name) for name in names}
    await world.client.post("/v1/completions", json=PLAIN | {"adapter": "loud"})  # Loads it.

    async def fail(body: dict[str, Any]) -> httpx.Response:
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        return await world.client.post(path, json=body | {"stream": is_stream})

    async with asyncio.timeout(30):
        failing = {name: asyncio.create_task(fail(fault[0])) for name, fault in FAULTS.items() if name != "deleted"}
        await until(lambda: len(world.hanging) == 2)
        failing["deleted"] = asyncio.create_task(fail(FAULTS["deleted"][0]))
        await until(lambda: world.engine.status().num_waiting == 3)
        for kind in ("views", "blobs"):
            shutil.rmtree(world.folder / "store" / kind)
        while not all(task.done() for task in failing.values()):
            found = await asyncio.gather(*(_scores(world.client, name) for name in names))
            assert found == [alone[name] for name in names]
    for name, task in failing.items():
        response = task.result()
        error = response.json()["error"]
        _, status, code, words = FAULTS[name]
        assert (response.status_code, error["code"]) == (status, code), error
        assert words in error["message"]
    await until(lambda: world.engine.status().num_running == world.engine.status().num_waiting == 0)
    world.engine.check_integrity()
    assert [await world.engine.unload(digest) for digest in world.engine.resident()] == [True] * 3
    assert world.engine.resident() == []
