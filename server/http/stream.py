"""Server-sent events, and the events of several answers as one sequence.

Source of the format: https://html.spec.whatwg.org/multipage/server-sent-events.html; `[DONE]` is OpenAI's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing

from fastapi import Response
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from adapterhub.errors import AdapterHubError
from server.engine.types import Engine, ErrorEvent, Event, GenerateRequest, TokenEvent

__all__ = ["DONE", "EventStream", "merge_answers", "sse"]

_log = logging.getLogger(__name__)
DONE = b"data: [DONE]\n\n"


def sse(body: BaseModel) -> bytes:
    """Write one event."""
    return b"data: " + body.model_dump_json().encode() + b"\n\n"


class EventStream(Response):
    """A response whose first event is already known, so that a failure before it still has its own status."""

    media_type = "text/event-stream"

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes, None], *, headers: Mapping[str, str]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no", **headers})
        del self.headers["content-length"]
        self._first = first
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002  # ASGI's signature.
        """Send the events; leaving early closes their source."""
        async with aclosing(self._rest):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": self._first, "more_body": True})
            async for event in self._rest:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def merge_answers(engine: Engine, requests: Sequence[GenerateRequest]) -> AsyncGenerator[tuple[int, Event], None]:
    """Run all requests at once and yield (index, event) as they come; ends with the first ErrorEvent.

    Closing the generator cancels every request that is still running.
    """
    events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
    tasks = [asyncio.create_task(_forward(engine, request, idx, events)) for idx, request in enumerate(requests)]
    num_open = len(tasks)
    try:
        while num_open:
            idx, event = await events.get()
            num_open -= not isinstance(event, TokenEvent)
            yield idx, event
            if isinstance(event, ErrorEvent):
                return
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _forward(engine: Engine, request: GenerateRequest, idx: int, into: asyncio.Queue[tuple[int, Event]]) -> None:
    try:
        async with aclosing(engine.generate(request)) as events:
            async for event in events:
                into.put_nowait((idx, event))
    except AdapterHubError as error:
        into.put_nowait((idx, ErrorEvent(error)))
    except Exception:  # The request ends here, and its client must hear of it.
        _log.exception("%s failed unexpectedly", request.request_id)
        error = AdapterHubError("The engine made a mistake.", f"Report request {request.request_id!r} with its log.")
        into.put_nowait((idx, ErrorEvent(error)))
