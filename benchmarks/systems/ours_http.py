"""This project through `hub serve`: streamed completions over one connection per request."""

from __future__ import annotations

import asyncio
import time
from importlib import metadata
from pathlib import Path

import httpx

from benchmarks.systems.job import Job, Outcome, Request, RequestTimes
from benchmarks.systems.memory import peak_mib, resident_mib
from benchmarks.systems.server import running_server, stream_answer

__all__ = ["run"]

_TIMEOUT_S = 600  # Longer than the slowest system takes for all requests.


def run(job: Job) -> Outcome:
    """Answer the requests of `job` through HTTP, with every adapter loaded before."""
    began = time.perf_counter()
    options = {"home": Path(job.home), "base_folder": job.base_folder, "threads": job.threads}
    names = [adapter.name for adapter in job.adapters]
    with running_server(**options, num_slots=max(1, len(names)), preload=names) as url:
        start, times = asyncio.run(_measure(job, url))
        total_s = max(one.last_s for one in times)
        resident = resident_mib()
        peak = peak_mib()
    return Outcome(
        requests=times,
        total_s=total_s,
        ready_s=start - began,
        base_mib=resident,
        loaded_mib=resident,
        peak_mib=peak,
        versions={name: metadata.version(name) for name in ("torch", "transformers", "uvicorn")},
    )


async def _measure(job: Job, url: str) -> tuple[float, tuple[RequestTimes, ...]]:
    limits = httpx.Limits(max_connections=job.concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=_TIMEOUT_S, limits=limits) as client:
        await _answer_all(client, job, job.warm_up, num_tokens=job.warm_up_tokens)
        start = time.perf_counter()
        return start, await _answer_all(client, job, job.requests, num_tokens=job.new_tokens, start=start)


async def _answer_all(
    client: httpx.AsyncClient, job: Job, requests: tuple[Request, ...], *, num_tokens: int, start: float = 0.0
) -> tuple[RequestTimes, ...]:
    places = asyncio.Semaphore(job.concurrency)

    async def one(request: Request) -> RequestTimes:
        name = "base" if request.adapter is None else job.adapters[request.adapter].name
        async with places:
            answered = await stream_answer(
                client, prompt_token_ids=request.prompt_token_ids, adapter=name, num_tokens=num_tokens, start=start
            )
        return answered.times

    return tuple(await asyncio.gather(*(one(request) for request in requests)))
