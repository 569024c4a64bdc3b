"""A tiny base, a store with three versions of two tasks, and a server over the fake engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from transformers import PreTrainedTokenizerBase

from adapterhub.base import Base
from adapterhub.base.loading import load_tokenizer
from adapterhub.base.prompts import text_token_ids
from adapterhub.store import Store
from server.engine.fake import FakeEngine
from server.http import create_app
from tests.support.adapters import write_adapter
from tests.support.live_server import live_server
from tests.support.tiny_models import build_base

CONTEXT_TOKENS = 256


@dataclass(frozen=True)
class Lab:
    """What every test of the HTTP layer needs."""

    base: Base
    tokenizer: PreTrainedTokenizerBase
    store: Store
    folder: Path

    def engine(self, **options) -> FakeEngine:
        options = {"context_tokens": CONTEXT_TOKENS} | options
        return FakeEngine(self.tokenizer, lambda text: text_token_ids(self.tokenizer, text), **options)


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("lab")
    base = build_base(folder / "base")
    other = build_base(folder / "other", seed=1)
    with Store.open(folder / "store") as store:
        for idx, task in enumerate(("summarize", "summarize", "boolq")):
            adapter = write_adapter(folder / f"adapter{idx}", base, method="lora", rank=2, seed=idx)
            store.publish(adapter, task=task, base=base)
        store.publish(write_adapter(folder / "foreign", other, method="lora", rank=2), task="foreign", base=other)
        yield Lab(base, load_tokenizer(base), store, folder)


Serve = Callable[[FakeEngine], AbstractContextManager[httpx.Client]]


@pytest.fixture
def serve(lab: Lab) -> Serve:
    @contextmanager
    def serving(engine: FakeEngine) -> Iterator[httpx.Client]:
        with (
            live_server(create_app(engine, lab.store, lab.base, lab.tokenizer)) as url,
            httpx.Client(base_url=url, timeout=20, trust_env=False) as client,
        ):
            yield client

    return serving


@pytest.fixture(scope="session")
def engine(lab: Lab) -> FakeEngine:
    return lab.engine()


@pytest.fixture(scope="session")
def url(lab: Lab, engine: FakeEngine) -> Iterator[str]:
    with live_server(create_app(engine, lab.store, lab.base, lab.tokenizer)) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=20, trust_env=False) as client:
        yield client
