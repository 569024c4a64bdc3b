"""Listen, serve, drain. The address is taken before the model loads, so that a wrong one fails within a second."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import math
import socket
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress

import uvicorn
from fastapi import FastAPI

from adapterhub.errors import PortInUseError, UserInputError
from server.engine.types import AdapterHandle
from server.http.service import Service

__all__ = ["bind", "run", "url_of"]

# Clients that do not read or write get this much longer than answers, whose error events must still reach the others.
_LAST_WORDS_S = 2
_BACKLOG = 2048  # Clients that connect while the model loads wait in this queue of the kernel.


def bind(host: str, port: int) -> socket.socket:
    """Take the address and begin to listen; port 0 takes a free one. Raises UserInputError and PortInUseError."""
    address = _loopback_address(host)
    listener = socket.socket(socket.AF_INET6 if address.version == 6 else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((str(address), port))
        listener.listen(_BACKLOG)
    except (OSError, OverflowError) as exc:
        listener.close()
        raise _bind_error(host, port, exc) from exc
    return listener


def _loopback_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError as exc:
        raise UserInputError(f"{host!r} is no IP address.", "Use 127.0.0.1, ::1 or localhost.") from exc
    if not address.is_loopback:
        raise UserInputError(
            f"Host {host!r} can be reached from other machines, and this server has no keys yet: anyone could use it.",
            "Listen on 127.0.0.1, and put a proxy that authenticates in front of it.",
        )
    return address


def _bind_error(host: str, port: int, exc: Exception) -> UserInputError:
    if isinstance(exc, OSError) and exc.errno == errno.EADDRINUSE:
        return PortInUseError(
            f"Port {port} on {host!r} is in use by another program.",
            f"Stop that program, or choose another port, such as `--port {port + 1}`; `--port 0` takes a free one.",
        )
    if isinstance(exc, OSError) and exc.errno == errno.EACCES:
        return UserInputError(f"Port {port} may not be used by this user.", "Choose one from 1024 to 65535.")
    return UserInputError(f"Cannot listen on {host!r} port {port}: {exc}.", "Choose another with --host and --port.")


def url_of(listener: socket.socket) -> str:
    """Return the URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if listener.family == socket.AF_INET6 else f"http://{host}:{port}"


async def run(
    app: FastAPI,
    listener: socket.socket,
    *,
    preload: Sequence[AdapterHandle],
    drain_s: float,
    on_ready: Callable[[], None],
) -> None:
    """Start the engine, load what was asked for, serve until SIGTERM or SIGINT, and drain. Raises AdapterLoadError."""
    service: Service = app.state.service
    await service.engine.start()
    try:
        for handle in preload:
            await service.engine.load(handle)
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="on",
            timeout_graceful_shutdown=math.ceil(drain_s) + _LAST_WORDS_S,
        )
        await _Server(config, service, drain_s=drain_s, on_ready=on_ready).serve(sockets=[listener])
    finally:
        await service.engine.stop()


class _Server(uvicorn.Server):
    """Stops in two stages: nothing new is accepted while answers in flight finish; what is late ends with an error."""

    def __init__(
        self, config: uvicorn.Config, service: Service, *, drain_s: float, on_ready: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._service = service
        self._drain_s = drain_s
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.is_draining = True
        late = asyncio.create_task(self._end_late_answers())
        await super().shutdown(sockets)
        late.cancel()
        with suppress(asyncio.CancelledError):
            await late

    async def _end_late_answers(self) -> None:
        await asyncio.sleep(self._drain_s)
        await self._service.engine.stop()

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Handle signals while serving; a stop that was asked for is a success, so none is raised again afterwards."""
        with super().capture_signals():
            yield
            self._captured_signals.clear()
