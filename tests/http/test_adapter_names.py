"""What a name means to a server: the base or a task, and the view that is loaded for it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from adapterhub.errors import AdapterLoadError, AdapterNotFoundError
from adapterhub.store import Store
from server.engine.build import build_engine
from server.engine.sequence import Limits
from server.engine.types import AdapterHandle, ErrorEvent, FinishEvent, GenerateRequest, SamplingParams
from server.http import AdapterNames, create_app
from tests.support.adapters import write_adapter
from tests.support.engines import collect
from tests.support.live_server import live_server


@pytest.fixture
def store(lab, tmp_path: Path) -> Iterator[Store]:
    """Two tasks, one of them named like the base of the server."""
    with Store.open(tmp_path / "store") as store:
        for idx, task in enumerate(("swap", lab.base.name)):
            adapter = write_adapter(tmp_path / f"adapter{idx}", lab.base, method="lora", rank=2, seed=idx)
            store.publish(adapter, task=task, base=replace(lab.base, name="renamed"))
        yield store


def _request(handle: AdapterHandle | None) -> GenerateRequest:
    return GenerateRequest(
        request_id="r", prompt_token_ids=(65, 66), adapter=handle, sampling=SamplingParams(max_tokens=2)
    )


def test_a_task_named_like_the_base_is_reached_by_the_adapter_field(lab, store: Store) -> None:
    with (
        live_server(create_app(lab.engine(), store, lab.base, lab.tokenizer)) as url,
        httpx.Client(base_url=url, timeout=20, trust_env=False) as client,
    ):

        def version(**fields: str) -> str:
            response = client.post("/v1/completions", json={"prompt": "x"} | fields)
            return response.headers["x-adapter-version"]

        assert version(adapter="tiny-llama") == "tiny-llama@v1"
        assert version(adapter="tiny-llama", model="tiny-llama") == "tiny-llama@v1"
        assert version(adapter="tiny-llama@v1") == "tiny-llama@v1"
        assert version(model="tiny-llama") == "base"
        assert version(adapter="base", model="tiny-llama") == "base"


async def test_the_adapter_field_names_the_base_by_one_word_only(lab) -> None:
    names = AdapterNames(lab.store, lab.base)
    assert (await names.choose("base", None)).handle is None
    with pytest.raises(AdapterNotFoundError, match=r"^No adapter 'tiny-llama' among 3 published\."):
        await names.choose("tiny-llama", None)


async def test_a_view_that_was_deleted_or_damaged_is_built_again_when_its_adapter_is_loaded(lab, store: Store) -> None:
    names = AdapterNames(store, lab.base)
    limits = Limits(host_adapter_mib=0)  # What loses its slot must come from the disk again.
    engine = build_engine(lab.base, num_slots=1, kv_memory_mib=8, limits=limits)
    await engine.start()
    try:
        swap, other = (names.resolve(name).handle for name in ("swap", "tiny-llama@v1"))
        assert swap is not None
        view = store.view(swap.digest)
        answers = [await collect(engine, _request(swap))]
        for is_deleted in (True, False):
            await collect(engine, _request(other))  # Takes the only slot.
            if is_deleted:
                shutil.rmtree(view)
            else:
                (view / "adapter_model.safetensors").unlink()
            answers.append(await collect(engine, _request(names.resolve("swap").handle)))
    finally:
        await engine.stop()
    assert isinstance(answers[0][-1], FinishEvent)
    assert answers[1:] == [answers[0]] * 2


async def test_an_adapter_whose_blobs_are_gone_fails_its_own_requests(lab, store: Store, tmp_path: Path) -> None:
    handle = AdapterNames(store, lab.base).resolve("swap").handle
    for folder in ("views", "blobs"):
        shutil.rmtree(tmp_path / "store" / folder)
    engine = build_engine(lab.base, num_slots=1, kv_memory_mib=8)
    await engine.start()
    try:
        (event,) = await collect(engine, _request(handle))
        fine = await collect(engine, _request(None))
    finally:
        await engine.stop()
    assert isinstance(event, ErrorEvent)
    assert isinstance(event.error, AdapterLoadError)
    assert str(event.error).startswith("Adapter 'swap@v1' cannot be loaded: ")
    assert isinstance(fine[-1], FinishEvent)
