"""Put the HTTP layer together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

from fastapi import FastAPI

import adapterhub
from adapterhub.base.identity import Base
from adapterhub.store import Store
from server.engine.types import Engine
from server.http import admin, chat, completions, health, models
from server.http.adapters import AdapterNames
from server.http.errors import install_error_handlers
from server.http.middleware import BodyLimit, CancelOnDisconnect, RequestIds
from server.http.replies import ErrorBody
from server.http.service import Service
from server.http.watcher import AliasWatcher

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["create_app"]

_MAX_BODY_BYTES = 4 << 20  # Far above the text of the longest context; keeps one client from filling the memory.


def create_app(engine: Engine, store: Store, base: Base, tokenizer: PreTrainedTokenizerBase) -> FastAPI:
    """Build the app. It starts the engine with its lifespan and stops it at the end."""
    adapters = AdapterNames(store, base)
    service = Service(engine, adapters, base, tokenizer)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        await engine.start()
        watch = asyncio.create_task(AliasWatcher(engine, adapters).run())
        try:
            yield
        finally:
            service.is_draining = True
            watch.cancel()
            with suppress(asyncio.CancelledError):
                await watch
            await engine.stop()
            service.close()

    app = FastAPI(title="AdapterHub", version=adapterhub.__version__, lifespan=lifespan, redirect_slashes=False)
    app.state.service = service
    for module in (chat, completions, models, admin):
        app.include_router(module.router, responses={"4XX": {"model": ErrorBody}})
    app.include_router(health.router)
    install_error_handlers(app)
    app.add_middleware(BodyLimit, max_bytes=_MAX_BODY_BYTES)
    app.add_middleware(CancelOnDisconnect)
    app.add_middleware(RequestIds)
    return app
