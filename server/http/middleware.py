"""Pure ASGI middleware: a request id for everything, a limit on bodies, and an end to work whose client is gone.

Source of the last: Starlette's BaseHTTPMiddleware hides disconnects from handlers
(https://github.com/encode/starlette/discussions/2094), so nothing here is built on it.
"""

from __future__ import annotations

import asyncio
import logging
import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["BodyLimit", "CancelOnDisconnect", "RequestIds"]

_log = logging.getLogger(__name__)
_HEADER = "x-request-id"
_ACCEPTED_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class RequestIds:
    """Gives each request an id, the caller's own if it sent a plain one, and returns it in a header."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(_HEADER, "")
        request_id = given if _ACCEPTED_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[_HEADER] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


class BodyLimit:
    """Refuses a body once it is longer than `max_bytes`, before it fills the memory."""

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        num_bytes = 0

        async def receive_within_limit() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_bytes:
                raise HTTPException(413)
            return message

        await self._app(scope, receive_within_limit, send)


class CancelOnDisconnect:
    """Cancels the handler when its client goes away before the response is complete, streaming or not."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        watch = _Watch(receive, send)
        try:
            await self._app(scope, watch.messages.get, watch.send)
        except asyncio.CancelledError:
            if not watch.is_gone or watch.handler.uncancel() > 0:
                raise
            _log.info("%s ended: the client went away", scope.get("state", {}).get("request_id"))
        finally:
            watch.pump.cancel()


class _Watch:
    """Reads what the client sends ahead of the handler, one message at a time, so that a disconnect is seen at once."""

    def __init__(self, receive: Receive, send: Send) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.handler = task
        self.messages: asyncio.Queue[Message] = asyncio.Queue(maxsize=1)
        self.is_gone = False
        self._is_complete = False
        self._receive = receive
        self._send = send
        self.pump = asyncio.create_task(self._pump())

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._is_complete = True  # The server reports a disconnect after each response; that one is no news.
        await self._send(message)

    async def _pump(self) -> None:
        while (message := await self._receive())["type"] != "http.disconnect":
            await self.messages.put(message)
        if not self._is_complete:
            self.is_gone = True
            self.handler.cancel()
