"""What the routes share: the engine, the adapters, the base and its tokenizer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar, cast

from fastapi import Request

from adapterhub.base.identity import Base
from server.engine.types import Engine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from server.http.adapters import AdapterNames

__all__ = ["Service", "get_request_id", "get_service"]

_T = TypeVar("_T")


@dataclass(slots=True)
class Service:
    """Everything one server process holds. is_draining: no new request is accepted, those in flight go on."""

    engine: Engine
    adapters: AdapterNames
    base: Base
    tokenizer: PreTrainedTokenizerBase
    is_draining: bool = False
    # One thread, because a tokenizer may not be borrowed twice.
    _tokenizing: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "tokenize"))

    async def tokenize(self, work: Callable[[PreTrainedTokenizerBase], _T]) -> _T:
        """Run tokenizer work off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, work, self.tokenizer)

    def close(self) -> None:
        """Let go of the thread."""
        self._tokenizing.shutdown(wait=False)


def get_service(request: Request) -> Service:
    """Return the service of the app that handles `request`."""
    return cast("Service", request.app.state.service)


def get_request_id(request: Request) -> str:
    """Return the id that `RequestIds` gave to the request."""
    return cast("str", request.scope["state"]["request_id"])
