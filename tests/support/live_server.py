"""A real server on a free loopback port, in a thread of the test process."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

__all__ = ["live_server"]


@contextmanager
def live_server(app: FastAPI) -> Iterator[str]:
    """Serve `app` and give its URL; at the end wait until it has drained."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=5))
        is_started = threading.Event()

        async def serve() -> None:
            task = asyncio.create_task(server.serve(sockets=[listener]))
            while not server.started and not task.done():
                await asyncio.sleep(0.005)
            is_started.set()
            await task

        thread = threading.Thread(target=lambda: asyncio.run(serve()), name="live-server")
        thread.start()
        try:
            assert is_started.wait(60)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()
