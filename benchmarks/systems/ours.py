"""This project's engine, driven in process: many asynchronous requests, one step thread."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, asynccontextmanager
from importlib import metadata
from pathlib import Path
from typing import cast, get_args

from adapterhub.base.identity import Base, describe_base
from adapterhub.base.loading import use_threads
from adapterhub.errors import UserInputError
from adapterhub.settings import Settings
from adapterhub.store import Store
from benchmarks.base_copy import QUANTIZATION
from benchmarks.systems.job import Job, Outcome, Request, RequestTimes
from benchmarks.systems.memory import peak_mib, resident_mib
from server.engine.build import build_engine
from server.engine.engine import NativeEngine
from server.engine.types import (
    AdapterHandle,
    Engine,
    ErrorEvent,
    GenerateRequest,
    SamplingParams,
    TokenEvent,
)
from server.http.adapters import AdapterNames
from server.products import Compute

__all__ = ["KV_MEMORY_MIB", "answer", "base_of", "handles_of", "run", "running_engine"]

KV_MEMORY_MIB = 512  # Holds sixteen requests of 250 tokens five times over; vLLM gets 1 GiB, its smallest.


def run(job: Job) -> Outcome:
    """Answer the requests of `job` with every adapter resident."""
    return asyncio.run(_run(job))


async def _run(job: Job) -> Outcome:
    began = time.perf_counter()
    base = base_of(job)
    with Store.open(Path(job.home) / "store") as store:
        handles = handles_of(job, store, base)
        async with running_engine(
            base, num_slots=max(1, len(handles)), threads=job.threads, compute=job.compute
        ) as engine:
            plain = [Request(prompt_token_ids=one.prompt_token_ids, adapter=None) for one in job.warm_up]
            await _answer_all(engine, plain, handles, job, num_tokens=job.warm_up_tokens)
            base_mib = resident_mib()
            for handle in handles:
                await engine.load(handle)
            await _answer_all(engine, job.warm_up, handles, job, num_tokens=job.warm_up_tokens)
            loaded_mib = resident_mib()
            start = time.perf_counter()
            times = await _answer_all(engine, job.requests, handles, job, num_tokens=job.new_tokens, start=start)
            total_s = time.perf_counter() - start
    return Outcome(
        requests=times,
        total_s=total_s,
        ready_s=start - began,
        base_mib=base_mib,
        loaded_mib=loaded_mib,
        peak_mib=peak_mib(),
        versions={name: metadata.version(name) for name in ("torch", "transformers")},
    )


def base_of(job: Job) -> Base:
    """Return the base quantized as the product does it by default; peers read a copy of its dequantized values."""
    return describe_base("benchmark", Path(job.base_folder), QUANTIZATION)


def handles_of(job: Job, store: Store, base: Base) -> list[AdapterHandle]:
    """Look up the job's adapters in the store."""
    names = AdapterNames(store, base)
    return [handle for one in job.adapters if (handle := names.resolve(one.name).handle) is not None]


@asynccontextmanager
async def running_engine(
    base: Base, *, num_slots: int, threads: int, compute: str = "float32"
) -> AsyncGenerator[NativeEngine]:
    """Start an engine, and stop it at the end. Raises UserInputError for an unknown arithmetic."""
    use_threads(Settings(threads=threads))
    engine = build_engine(base, num_slots=num_slots, kv_memory_mib=KV_MEMORY_MIB, compute=_compute(compute))
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


def _compute(word: str) -> Compute:
    if word not in get_args(Compute):
        raise UserInputError(f"compute is {word!r}.", f"Choose from {', '.join(get_args(Compute))}.")
    return cast("Compute", word)


async def _answer_all(
    engine: Engine,
    requests: tuple[Request, ...] | list[Request],
    handles: list[AdapterHandle],
    job: Job,
    *,
    num_tokens: int,
    start: float = 0.0,
) -> tuple[RequestTimes, ...]:
    """Answer all requests, at most `job.concurrency` at once, in their order."""
    places = asyncio.Semaphore(job.concurrency)

    async def one(idx: int, request: Request) -> RequestTimes:
        handle = None if request.adapter is None else handles[request.adapter]
        async with places:
            return await answer(engine, f"r{idx}", request, handle, num_tokens=num_tokens, start=start)

    return tuple(await asyncio.gather(*(one(idx, request) for idx, request in enumerate(requests))))


async def answer(
    engine: Engine,
    request_id: str,
    request: Request,
    handle: AdapterHandle | None,
    *,
    num_tokens: int,
    start: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
) -> RequestTimes:
    """Generate exactly `num_tokens` greedy tokens and note when they came. Raises what the engine reports."""
    sampling = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
    asked = GenerateRequest(
        request_id=request_id, prompt_token_ids=request.prompt_token_ids, adapter=handle, sampling=sampling
    )
    sent = clock()
    token_ids: list[int] = []
    first = last = sent
    async with aclosing(engine.generate(asked)) as events:
        async for event in events:
            if isinstance(event, ErrorEvent):
                raise event.error
            if isinstance(event, TokenEvent):
                last = clock()
                first = first if token_ids else last
                token_ids.append(event.token_id)
    return RequestTimes(
        sent_s=sent - start,
        first_s=first - start,
        last_s=last - start,
        num_tokens=len(token_ids),
        token_ids=tuple(token_ids),
    )
