"""A thousand loads, unloads, publications and moved aliases under traffic: every answer is its header's adapter's.

Each adapter answers with a letter of its own (`tests.support.forcing`), so a wrong weight, slot, key or value shows.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import httpx
import pytest

from adapterhub.base.identity import Base
from adapterhub.base.loading import load_tokenizer
from adapterhub.store import Store, Version
from server.engine.build import build_engine
from server.engine.engine import NativeEngine
from server.engine.sequence import Limits
from server.http import AdapterNames, create_app
from tests.support.engines import until
from tests.support.forcing import build_forcible_base, write_forcing_adapter
from tests.support.live_server import live_server

NUM_OPERATIONS = 1000
NUM_CLIENTS = 3
NUM_SLOTS = 3
TASKS = ("alpha", "beta", "gamma", "delta", "omega")
PROMPTS = (
    "hello",
    "x",
    "a prompt that fills more than one block of keys and values",
    "a prompt that fills more than one",
)


@dataclass
class Hub:
    """A store, a server over it and what its answers must be. letters: by serving digest; answers: by digest."""

    folder: Path
    base: Base
    store: Store
    engine: NativeEngine
    client: httpx.AsyncClient
    rng: random.Random
    letters: dict[str, str] = field(default_factory=dict)
    versions: dict[str, list[Version]] = field(default_factory=dict)
    answers: Counter[str] = field(default_factory=Counter)
    is_over: bool = False

    def publish(self, task: str) -> None:
        """Publish a version of `task` with the next letter and contents that nobody has published before."""
        number = len(self.letters)
        place = number % len(ascii_uppercase)
        folder = self.folder / f"adapter{number}"
        letter = ascii_uppercase[place]
        write_forcing_adapter(folder, self.base, letter=letter, direction=place, force=30 + 0.01 * number)
        version = self.store.publish(folder, task=task, base=self.base)
        self.letters[version.serving_digest] = letter
        self.versions.setdefault(task, []).append(version)

    def some_name(self) -> tuple[str, str | None]:
        """Return a name of an adapter, and its digest where the name cannot move."""
        task = self.rng.choice(TASKS)
        version = self.rng.choice(self.versions[task][-3:])
        names = [(task, None), (f"{task}@stable", None), (version.label, version.serving_digest)]
        return self.rng.choice(names)

    async def ask(self) -> None:
        """Send one request for an adapter or a mix, whole or as a stream, and check its answer against its header."""
        name, digest = self.some_name()
        adapter: Any = name
        if digest is not None and self.rng.random() < 0.2:
            adapter = {"mix": {name: 1.5, self.some_name()[0]: 0.5}}
        num_tokens = self.rng.randint(1, 5)
        body = {"adapter": adapter, "prompt": self.rng.choice(PROMPTS), "max_tokens": num_tokens, "temperature": 0}
        if self.rng.random() < 0.3:
            text, info, header = await self._stream(body | {"stream": True})
        else:
            response = await self.client.post("/v1/completions", json=body)
            assert response.status_code == 200, response.text
            reply = response.json()
            text, info, header = reply["choices"][0]["text"], reply["adapter"], response.headers["x-adapter-digest"]
        assert info["digest"] == header
        members = info.get("members") or [{"digest": header, "weight": 1.0}]
        strongest = max(members, key=lambda member: member["weight"])["digest"].removeprefix("sha256:")
        assert text == num_tokens * self.letters[strongest], (adapter, header)
        assert digest in (None, strongest)
        self.answers[header] += 1

    async def _stream(self, body: dict[str, Any]) -> tuple[str, dict[str, Any], str]:
        async with self.client.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200, await response.aread()
            lines = [line.removeprefix("data: ") async for line in response.aiter_lines() if line]
        assert lines[-1] == "[DONE]"
        chunks = [json.loads(line) for line in lines[:-1]]
        (info,) = {json.dumps(chunk["adapter"]): chunk["adapter"] for chunk in chunks}.values()
        text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        return text, info, response.headers["x-adapter-digest"]

    async def traffic(self) -> None:
        while not self.is_over:
            await self.ask()

    async def operate(self, kind: str) -> None:
        """Do one thing to the adapters, while requests run."""
        task = self.rng.choice(TASKS)
        version = self.rng.choice(self.versions[task][-4:])
        match kind:
            case "publish":
                await asyncio.to_thread(self.publish, task)
            case "swap":
                label, actor = f"{task}@stable", "test"
                await asyncio.to_thread(self.store.point_alias, label, version.label, actor=actor, reason=actor)
            case "load":
                handle = AdapterNames(self.store, self.base).resolve(version.label).handle
                assert handle is not None
                await self.engine.load(handle)
            case "measure":
                response = await self.client.post(f"/admin/v1/adapters/{version.label}/load")
                assert response.status_code == 200, response.text
                assert response.json()["digest"] == f"sha256:{version.serving_digest}"
            case "unload":
                loaded = self.engine.resident()
                await self.engine.unload(self.rng.choice(loaded) if loaded else version.serving_digest)


@pytest.fixture
def base(tmp_path: Path) -> Base:
    return build_forcible_base(tmp_path / "base")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store") as store:
        yield store


@asynccontextmanager
async def serving(folder: Path, base: Base, store: Store) -> AsyncIterator[Hub]:
    """A hub with one version of every task on a server whose adapters fit neither its slots nor its host memory."""
    limits = Limits(host_adapter_mib=0, max_step_tokens=32, max_sequences=8)
    engine = build_engine(base, num_slots=NUM_SLOTS, kv_memory_mib=1, limits=limits)
    with live_server(create_app(engine, store, base, load_tokenizer(base))) as url:
        async with httpx.AsyncClient(base_url=url, timeout=30, trust_env=False) as client:
            hub = Hub(folder, base, store, engine, client, random.Random(4))
            for task in TASKS:
                hub.publish(task)
            yield hub
            await until(lambda: engine.status().num_running == engine.status().num_waiting == 0)
            engine.check_integrity()


async def test_a_thousand_changes_of_the_adapters_under_traffic_mix_up_no_answer_and_fail_none(
    tmp_path: Path, base: Base, store: Store
) -> None:
    async with serving(tmp_path, base, store) as hub, asyncio.timeout(150):
        clients = [asyncio.create_task(hub.traffic()) for _ in range(NUM_CLIENTS)]
        kinds = ["publish", "load", "measure", "unload", "swap"]
        for _ in range(NUM_OPERATIONS):
            await hub.operate(hub.rng.choices(kinds, weights=[2, 6, 1, 9, 6])[0])
            failed = [client for client in clients if client.done()]
            assert not failed, failed[0].exception()
        hub.is_over = True
        await asyncio.gather(*clients)
    assert hub.answers.total() > 150
    assert len(hub.answers) > 5 * NUM_SLOTS
