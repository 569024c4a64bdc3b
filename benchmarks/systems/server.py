"""`hub serve` in a process of its own, and one streamed answer of it. Used where the whole path is measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from benchmarks.base_copy import QUANTIZATION
from benchmarks.systems.job import RequestTimes
from benchmarks.systems.ours import KV_MEMORY_MIB

__all__ = ["StreamedAnswer", "running_server", "stream_answer"]

_STOP_S = 60


@contextmanager
def running_server(
    *, home: Path, base_folder: str, threads: int, num_slots: int, preload: Sequence[str] = ()
) -> Generator[str]:
    """Serve the adapters of the store in `home` on a free port, and give the URL."""
    hub = Path(sys.executable).with_name("hub")
    command = [str(hub), "serve", "--port", "0", "--base", base_folder, "--quantization", QUANTIZATION]
    command += ["--max-slots", str(num_slots), "--kv-memory-mib", str(KV_MEMORY_MIB)]
    if preload:
        command += ["--preload", ",".join(preload)]
    environment = {**os.environ, "ADAPTERHUB_HOME": str(home), "ADAPTERHUB_THREADS": str(threads)}
    log = home / "serve.log"
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout is not None
        try:
            url = process.stdout.readline().strip()
            if not url:
                raise RuntimeError(f"hub serve did not start; see {log}.")
            yield url
        finally:
            process.terminate()
            process.wait(_STOP_S)


class StreamedAnswer:
    """One answer as its chunks arrive. version: `task@vN` from the response headers."""

    def __init__(self, times: RequestTimes, *, version: str, text: str) -> None:
        self.times = times
        self.version = version
        self.text = text


async def stream_answer(
    client: httpx.AsyncClient, *, prompt_token_ids: Sequence[int], adapter: str, num_tokens: int, start: float = 0.0
) -> StreamedAnswer:
    """Ask for one greedy answer; the first and last times are those of chunks that show text."""
    body: dict[str, Any] = {
        "prompt": list(prompt_token_ids),
        "adapter": adapter,
        "temperature": 0,
        "max_tokens": num_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }
    sent = first = last = time.perf_counter()
    text, num_received = "", 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.is_error:
            raise RuntimeError((await response.aread()).decode())
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise RuntimeError(str(chunk["error"]))
            if chunk["choices"] and chunk["choices"][0]["text"]:
                last = time.perf_counter()
                first = first if text else last
                text += chunk["choices"][0]["text"]
            if chunk.get("usage"):
                num_received = chunk["usage"]["completion_tokens"]
    times = RequestTimes(sent_s=sent - start, first_s=first - start, last_s=last - start, num_tokens=num_received)
    return StreamedAnswer(times, version=response.headers["x-adapter-version"], text=text)
