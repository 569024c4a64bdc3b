"""Many more adapters than slots: latency under Zipf traffic, swaps under load, and what each memory tier costs.

    python -m benchmarks.churn                                           # 1,000 adapters, 16 slots, three times
    python -m benchmarks.churn --adapters 40 --slots 4 --requests 20 --repetitions 1 --swaps 2 --out FILE

Every adapter answers with a word of its own (`benchmarks.token_adapters`), so each answer shows which adapter gave it.
The same requests arrive at the same times (Poisson) at an engine with a slot for every adapter and at one with few; the
rate is a share of what the first one can do. Zipf's law: the adapter of popularity k is asked for in proportion to
k ** -skew, as caches are measured since https://doi.org/10.1109/INFCOM.1999.749260.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import tempfile
import time
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from adapterhub.base.identity import Base
from adapterhub.errors import AdapterHubError
from adapterhub.settings import Settings
from adapterhub.store import Store
from benchmarks.base_copy import benchmark_base
from benchmarks.machine import describe_machine, describe_revision
from benchmarks.options import run_command
from benchmarks.spread import percentile, spread
from benchmarks.swaps import measure_swaps
from benchmarks.systems.job import Request
from benchmarks.systems.ours import answer, running_engine
from benchmarks.token_adapters import TokenAdapters
from benchmarks.workload import load_prompts
from server.engine.types import AdapterHandle, Engine
from server.http.adapters import AdapterNames

__all__ = ["ChurnConfig", "arrivals", "main", "zipf_choices"]

_RESULT = Path(__file__).parent / "results" / "serving-churn.json"
_NUM_PROMPTS = 32
_NUM_CALIBRATION = 48  # Requests, all at once: enough to fill the batch and keep it full for a while.
_CDF_PERCENTS = tuple(range(0, 101))
_TIER_ADAPTERS = 12
_NEVER_S = 3600.0  # Latency of a request that failed: worse than any answer, so that failing never looks fast.


class ChurnConfig(BaseModel):
    """One measurement. load: share of the rate that the all-resident engine reaches; skew: exponent of Zipf's law."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    adapters: int = Field(default=1000, ge=4, le=1024)
    slots: int = Field(default=16, ge=2, le=1024)
    requests: int = Field(default=600, ge=4, le=100_000)
    repetitions: int = Field(default=3, ge=1, le=100)
    new_tokens: int = Field(default=16, ge=1, le=256)
    load: float = Field(default=0.6, gt=0, le=1)
    skew: float = Field(default=1.0, ge=0, le=4)
    swaps: int = Field(default=20, ge=0, le=1000)
    seed: int = 0
    threads: int = Field(default_factory=lambda: os.cpu_count() or 1, ge=1)


def zipf_choices(num_items: int, num_draws: int, *, skew: float, seed: int) -> list[int]:
    """Draw items 0 to num_items - 1 with probabilities in proportion to (item + 1) ** -skew."""
    weights = list(accumulate((rank + 1) ** -skew for rank in range(num_items)))
    return random.Random(seed).choices(range(num_items), cum_weights=weights, k=num_draws)


def arrivals(num_requests: int, *, rate_per_s: float, seed: int) -> list[float]:
    """Times in seconds at which a Poisson process of that rate sends its requests."""
    draw = random.Random(seed)
    return list(accumulate(draw.expovariate(rate_per_s) for _ in range(num_requests)))


class _Traffic:
    """The requests of one measurement, and the adapters they name."""

    def __init__(self, config: ChurnConfig, base: Base, home: Path, prompts: list[tuple[int, ...]]) -> None:
        self.config = config
        self.base = base
        self.home = home
        self.prompts = prompts
        self.adapters = TokenAdapters.of(base, prompts[:4], num_adapters=config.adapters + config.swaps)
        self._store = Store.open(home / "store")
        self._publish()

    def close(self) -> None:
        """Let go of the store."""
        self._store.close()

    def _publish(self) -> None:
        with tempfile.TemporaryDirectory(dir=self.home) as scratch:
            for idx in range(self.config.adapters):
                folder = Path(scratch) / str(idx)
                self.adapters.write(folder, idx=idx, seed=idx)
                self._store.publish(folder, task=f"word-{idx}", base=self.base, trust_base=True)

    def handles(self) -> list[AdapterHandle]:
        """Look all adapters up, by popularity."""
        names = AdapterNames(self._store, self.base)
        found = [names.resolve(f"word-{idx}").handle for idx in range(self.config.adapters)]
        return [handle for handle in found if handle is not None]

    async def ask(self, engine: Engine, handles: list[AdapterHandle], number: int, idx: int) -> dict[str, float]:
        """Send request `number` to adapter `idx`; return its latency and whether it was wrong or failed."""
        request = Request(prompt_token_ids=self.prompts[number % len(self.prompts)], adapter=idx)
        began = time.perf_counter()
        expected = (self.adapters.words[idx][0],) * self.config.new_tokens
        try:
            times = await answer(engine, f"r{number}", request, handles[idx], num_tokens=self.config.new_tokens)
        except AdapterHubError:
            return {"latency_s": _NEVER_S, "first_s": _NEVER_S, "is_wrong": 0.0, "is_failed": 1.0}
        return {
            "latency_s": time.perf_counter() - began,
            "first_s": times.first_s - times.sent_s,
            "is_wrong": float(times.token_ids != expected),
            "is_failed": 0.0,
        }


async def _rate(engine: Engine, traffic: _Traffic, handles: list[AdapterHandle]) -> float:
    """Requests per second when the engine always has enough of them."""
    began = time.perf_counter()
    await asyncio.gather(
        *(traffic.ask(engine, handles, number, number % len(handles)) for number in range(_NUM_CALIBRATION))
    )
    return _NUM_CALIBRATION / (time.perf_counter() - began)


async def _replay(
    engine: Engine, traffic: _Traffic, handles: list[AdapterHandle], *, rate_per_s: float
) -> list[dict[str, float]]:
    """Send every request at its time, whether earlier ones are answered or not."""
    config = traffic.config
    chosen = zipf_choices(len(handles), config.requests, skew=config.skew, seed=config.seed)
    due = arrivals(config.requests, rate_per_s=rate_per_s, seed=config.seed)
    began = time.perf_counter()

    async def one(number: int) -> dict[str, float]:
        await asyncio.sleep(max(0.0, began + due[number] - time.perf_counter()))
        return await traffic.ask(engine, handles, number, chosen[number])

    return list(await asyncio.gather(*(one(number) for number in range(config.requests))))


async def _zipf(traffic: _Traffic, repetition: int) -> dict[str, Any]:
    """One repetition: calibrate and replay with all resident, then replay with few slots."""
    config, handles = traffic.config, traffic.handles()
    async with running_engine(traffic.base, num_slots=len(handles), threads=config.threads) as engine:
        for handle in handles:
            await engine.load(handle)
        rate_per_s = config.load * await _rate(engine, traffic, handles)
        resident = await _replay(engine, traffic, handles, rate_per_s=rate_per_s)
    async with running_engine(traffic.base, num_slots=config.slots, threads=config.threads) as engine:
        await _rate(engine, traffic, handles[: config.slots])  # Fills the slots: traffic has been going on for long.
        swapped = await _replay(engine, traffic, handles, rate_per_s=rate_per_s)
    record = {"rate_per_s": rate_per_s} | _latencies(resident, "resident") | _latencies(swapped, "slots")
    for percent in (50, 99):
        record[f"ratio_p{percent}"] = record[f"slots_p{percent}_s"] / record[f"resident_p{percent}_s"]
    print(
        f"repetition {repetition + 1}: p99 ratio {record['ratio_p99']:.2f}, wrong {record['slots_wrong']:.0f}",
        flush=True,
    )
    cdf = {name: _cdf(answers) for name, answers in (("resident", resident), ("slots", swapped))}
    return {"measures": record, "cdf_s": cdf}


def _latencies(answers: list[dict[str, float]], prefix: str) -> dict[str, float]:
    latencies = [one["latency_s"] for one in answers]
    return {
        f"{prefix}_p50_s": percentile(latencies, 50),
        f"{prefix}_p99_s": percentile(latencies, 99),
        f"{prefix}_first_p50_s": percentile([one["first_s"] for one in answers], 50),
        f"{prefix}_first_p99_s": percentile([one["first_s"] for one in answers], 99),
        f"{prefix}_wrong": sum(one["is_wrong"] for one in answers),
        f"{prefix}_failed": sum(one["is_failed"] for one in answers),
    }


def _cdf(answers: list[dict[str, float]]) -> list[float]:
    latencies = [one["latency_s"] for one in answers]
    return [round(percentile(latencies, percent), 4) for percent in _CDF_PERCENTS]


async def _tiers(traffic: _Traffic) -> dict[str, float]:
    """Median time to first token, alone, when the adapter comes from disk, from the host, or sits in a slot."""
    handles = traffic.handles()[:_TIER_ADAPTERS]
    seen: dict[str, list[float]] = {"disk": [], "host": [], "slot": []}
    async with running_engine(traffic.base, num_slots=2, threads=traffic.config.threads) as engine:
        await traffic.ask(engine, handles, 0, 0)
        for tier in ("disk", "host"):
            for idx in range(1, len(handles)):  # Two slots, so that each has left them when its turn comes again.
                seen[tier].append((await traffic.ask(engine, handles, 0, idx))["first_s"])
        for _ in range(len(handles)):
            seen["slot"].append((await traffic.ask(engine, handles, 0, len(handles) - 1))["first_s"])
    return {f"{tier}_first_p50_s": percentile(values, 50) for tier, values in seen.items()}


def measure(config: ChurnConfig, *, settings: Settings, cache: Path, out: Path) -> None:
    """Run everything and write the result."""
    base = benchmark_base(settings)
    prompts = load_prompts(base, settings, num_prompts=_NUM_PROMPTS)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="churn-") as home:
        traffic = _Traffic(config, base, Path(home), prompts)
        runs = [asyncio.run(_zipf(traffic, repetition)) for repetition in range(config.repetitions)]
        tiers = asyncio.run(_tiers(traffic))
        swaps = measure_swaps(
            traffic.adapters,
            prompts,
            home=Path(home),
            first=config.adapters,
            num_swaps=config.swaps,
            threads=config.threads,
        )
        traffic.close()
    result = {
        "revision": describe_revision(),
        "machine": describe_machine(),
        "base": base.name,
        "base_digest": base.digest,
        "quantization": base.quantization,
        "config": config.model_dump(mode="json"),
        "zipf": {
            "repetitions": [run["measures"] for run in runs],
            "spread": spread([run["measures"] for run in runs]),
            "cdf_percents": list(_CDF_PERCENTS),
            "cdf_s": runs[0]["cdf_s"],
        },
        "tiers": tiers,
        "swaps": swaps,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the result; exits with 2 for wrong options."""
    run_command(
        measure, ChurnConfig, arguments, about=__doc__, cache_help="folder for the temporary store", result=_RESULT
    )


if __name__ == "__main__":
    main()
