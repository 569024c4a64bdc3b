"""`hub serve` as people start it: it takes the address first, says when it is ready, and drains when told to stop."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from adapterhub.errors import AdapterLoadError, AdapterNotFoundError, PortInUseError, UserInputError
from adapterhub.settings import load_settings
from adapterhub.store import Store
from server.engine.build import build_engine
from server.engine.sequence import Limits
from server.engine.types import AdapterHandle
from server.http import create_app
from server.http.run import bind, run, url_of
from server.serve import serve
from tests.support.adapters import write_adapter

_COMMAND = [sys.executable, "-c", "from adapterhub.cli import main; main()", "serve"]


def _environment(home: Path) -> dict[str, str]:
    return os.environ | {"ADAPTERHUB_HOME": str(home), "ADAPTERHUB_QUANTIZATION": "none", "NO_COLOR": "1"}


@contextmanager
def _serving(home: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start the command and give its process and the line it printed."""
    with (home / "stderr.log").open("w") as log:
        process = subprocess.Popen(
            [*_COMMAND, *options], env=_environment(home), stdout=subprocess.PIPE, stderr=log, text=True
        )
        try:
            assert process.stdout is not None
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


def _fail(home: Path, *options: str) -> tuple[int, str]:
    done = subprocess.run(
        [*_COMMAND, *options], env=_environment(home), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == ""
    return done.returncode, done.stderr


def test_it_prints_its_url_serves_and_drains_on_sigterm(lab, tmp_path: Path) -> None:
    with Store.open(tmp_path / "store") as store:
        adapter = write_adapter(tmp_path / "adapter", lab.base, method="lora", rank=4, seed=2)
        store.publish(adapter, task="swap", base=lab.base)
    options = ("--port", "0", "--base", str(lab.base.folder), "--max-slots", "2", "--preload", "swap")
    with _serving(tmp_path, *options) as (process, url):
        log = tmp_path / "stderr.log"
        assert url.startswith("http://127.0.0.1:"), log.read_text()
        body = {"adapter": "swap", "prompt": "hello", "max_tokens": 200, "temperature": 0, "stream": True}
        with httpx.Client(base_url=url, trust_env=False, timeout=30) as client:
            assert client.get("/health/ready").json()["status"] == "ready"
            with client.stream("POST", "/v1/completions", json=body) as stream:
                lines = stream.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"
        assert process.wait(10) == 0
    text = log.read_text()
    assert "2 slots; keys and values of" in text
    assert "kernel" in text


async def test_an_answer_that_takes_too_long_at_shutdown_ends_with_an_error(lab) -> None:
    app = create_app(lab.engine(step_s=0.05), lab.store, lab.base, lab.tokenizer)
    is_ready = asyncio.Event()
    with bind("127.0.0.1", 0) as listener:
        serving = asyncio.create_task(run(app, listener, preload=[], drain_s=0.2, on_ready=is_ready.set))
        await is_ready.wait()
        body = {"prompt": "hello" * 20, "max_tokens": 150, "stream": True}
        async with (
            httpx.AsyncClient(base_url=url_of(listener), trust_env=False, timeout=30) as client,
            client.stream("POST", "/v1/completions", json=body) as stream,
        ):
            lines = stream.aiter_lines()
            await anext(lines)
            os.kill(os.getpid(), signal.SIGTERM)
            rest = [line async for line in lines if line]
    await serving
    error = json.loads(rest[-1].removeprefix("data: "))["error"]
    assert error["message"] == "The server is shutting down. Send the request again later."
    assert error["code"] == "overloaded"


async def test_a_client_that_never_ends_its_body_does_not_hold_up_shutdown(lab) -> None:
    app = create_app(lab.engine(), lab.store, lab.base, lab.tokenizer)
    is_ready = asyncio.Event()
    with bind("127.0.0.1", 0) as listener:
        serving = asyncio.create_task(run(app, listener, preload=[], drain_s=0.1, on_ready=is_ready.set))
        await is_ready.wait()
        _, writer = await asyncio.open_connection(*listener.getsockname())
        writer.write(b'POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99\r\n\r\n{"prompt"')
        await writer.drain()
        await asyncio.sleep(0.1)
        assert not serving.done()
        os.kill(os.getpid(), signal.SIGTERM)
        done, _ = await asyncio.wait([serving], timeout=6)
        assert done == {serving}
        assert serving.exception() is None
        writer.close()


async def test_a_preload_that_fails_stops_the_start(lab) -> None:
    handle = AdapterHandle.alone("d", lambda: Path("view"), "summarize@v1")
    app = create_app(lab.engine(broken=["d"]), lab.store, lab.base, lab.tokenizer)
    with bind("127.0.0.1", 0) as listener, pytest.raises(AdapterLoadError, match="'summarize@v1' cannot be loaded"):
        await run(app, listener, preload=[handle], drain_s=1, on_ready=lambda: None)


def test_a_port_in_use_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        started = time.monotonic()
        code, stderr = _fail(tmp_path, "--port", str(port))
    assert code == 2
    assert time.monotonic() - started < 10
    assert f"error (port_in_use): Port {port} on '127.0.0.1' is in use by another program." in stderr
    assert (
        f"Stop that program, or choose another port, such as `--port {port + 1}`; `--port 0` takes a free one."
        in stderr
    )


def test_a_base_that_is_not_here_is_refused(tmp_path: Path) -> None:
    code, stderr = _fail(tmp_path, "--port", "0")
    assert code == 2
    assert "Run `hub base pull smollm2-135m-instruct`." in stderr


def test_two_servers_cannot_take_one_port_even_while_they_load() -> None:
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        assert url_of(first) == f"http://127.0.0.1:{port}"
        with pytest.raises(PortInUseError):
            bind("localhost", port)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5"])
def test_hosts_that_others_can_reach_are_refused(host: str) -> None:
    with pytest.raises(UserInputError) as refused:
        bind(host, 0)
    assert str(refused.value) == (
        f"Host {host!r} can be reached from other machines, and this server has no keys yet: anyone could use it. "
        "Listen on 127.0.0.1, and put a proxy that authenticates in front of it."
    )


def test_other_bad_addresses_are_refused() -> None:
    with pytest.raises(UserInputError, match=r"^'example' is no IP address\. Use 127\.0\.0\.1, ::1 or localhost\.$"):
        bind("example", 0)
    with pytest.raises(UserInputError, match=r"^Cannot listen on '127\.0\.0\.1' port 99999: .* Choose another with"):
        bind("127.0.0.1", 99999)


def test_a_port_that_is_not_allowed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(socket.socket, "listen", deny)
    with pytest.raises(UserInputError) as refused:
        bind("127.0.0.1", 0)
    assert str(refused.value) == "Port 0 may not be used by this user. Choose one from 1024 to 65535."


def test_a_key_value_memory_that_is_too_small_is_refused(lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.engine.build._FLOAT_BYTES", 4000)
    with pytest.raises(UserInputError) as refused:
        build_engine(lab.base, num_slots=1, kv_memory_mib=1)
    assert str(refused.value).startswith("1 MiB hold the keys and values of 0 tokens of 'tiny-llama'. Give at least ")
    assert str(refused.value).endswith(" with --kv-memory-mib.")


def test_a_small_memory_limits_requests_and_says_so(lab, caplog: pytest.LogCaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr("server.engine.build._FLOAT_BYTES", 20)
    engine = build_engine(lab.base, num_slots=1, kv_memory_mib=1)
    assert 256 <= engine.context_tokens < 512
    assert "requests are limited to" in caplog.text


def test_a_preload_that_does_not_exist_is_refused_before_the_model_loads(lab, tmp_path: Path) -> None:
    settings = load_settings(home=tmp_path, base=str(lab.base.folder), quantization="none")
    with pytest.raises(AdapterNotFoundError, match=r"^No adapter 'nothing' among 0 published\."):
        serve(
            settings,
            host="127.0.0.1",
            port=0,
            num_slots=1,
            preload=["nothing"],
            kv_memory_mib=8,
            compute="float32",
            limits=Limits(),
            drain_s=1,
            on_ready=lambda _: None,
        )
