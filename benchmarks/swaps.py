"""Hot swaps through HTTP under load: how soon a new version answers after it was published and its alias moved."""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path

import httpx

from adapterhub.store import Store
from benchmarks.spread import percentile
from benchmarks.systems.server import running_server, stream_answer
from benchmarks.token_adapters import TokenAdapters

__all__ = ["measure_swaps"]

_TASK = "swapped"
_NUM_CLIENTS = 4  # Who ask for the swapped task all the time.
_NUM_TOKENS = 8
_TIMEOUT_S = 120


def measure_swaps(
    adapters: TokenAdapters, prompts: list[tuple[int, ...]], *, home: Path, first: int, num_swaps: int, threads: int
) -> dict[str, float]:
    """Publish `num_swaps` versions of one task while clients ask for it, and check every answer.

    first: number of the first word that is free for these versions. Returns seconds for publishing, from the move of
    the alias to the last token of the first answer by the new version, and counts of answers, wrong and failed ones.
    """
    if num_swaps < 1:
        return {}
    words = [adapters.words[first + number][1] for number in range(num_swaps)]
    with running_server(home=home, base_folder=str(adapters.base.folder), threads=threads, num_slots=4) as url:
        return asyncio.run(_Swaps(adapters, words, prompts, home, first).run(url))


class _Swaps:
    """One measurement. Versions are numbered from 1; version v answers with words[v - 1]."""

    def __init__(
        self, adapters: TokenAdapters, words: list[str], prompts: list[tuple[int, ...]], home: Path, first: int
    ) -> None:
        self._adapters = adapters
        self._words = words
        self._prompts = prompts
        self._home = home
        self._first = first
        self._answers = self._wrong = self._failed = 0
        self._is_over = False

    async def run(self, url: str) -> dict[str, float]:
        """Swap again and again; return the numbers."""
        publish_s: list[float] = []
        flip_s: list[float] = []
        with Store.open(self._home / "store") as store:
            self._publish(store, 0)
            async with httpx.AsyncClient(base_url=url, timeout=_TIMEOUT_S) as client:
                await self._ask(client, 0)
                others = [asyncio.create_task(self._keep_asking(client, number)) for number in range(_NUM_CLIENTS)]
                for number in range(1, len(self._words)):
                    began = time.perf_counter()
                    await asyncio.to_thread(self._publish, store, number)
                    published = time.perf_counter()
                    reason = "measure a swap"
                    store.point_alias(f"{_TASK}@stable", f"v{number + 1}", actor="benchmark", reason=reason)
                    moved = time.perf_counter()
                    while await self._ask(client, number) != f"{_TASK}@v{number + 1}":
                        pass
                    flip_s.append(time.perf_counter() - moved)
                    publish_s.append(published - began)
                self._is_over = True
                await asyncio.gather(*others)
        numbers: dict[str, float] = {"answers": self._answers, "wrong": self._wrong, "failed": self._failed}
        for name, values in (("publish", publish_s), ("flip", flip_s)):
            for percent in (50, 99) if values else ():
                numbers[f"{name}_p{percent}_s"] = percentile(values, percent)
        return numbers

    def _publish(self, store: Store, number: int) -> None:
        with tempfile.TemporaryDirectory(dir=self._home) as scratch:
            folder = Path(scratch) / "adapter"
            self._adapters.write(folder, idx=self._first + number, seed=self._first + number)
            store.publish(folder, task=_TASK, base=self._adapters.base, trust_base=True)

    async def _keep_asking(self, client: httpx.AsyncClient, number: int) -> None:
        while not self._is_over:
            await self._ask(client, number)
            number += _NUM_CLIENTS

    async def _ask(self, client: httpx.AsyncClient, number: int) -> str:
        """Ask once, check the answer against the version in its header, and return that version."""
        prompt = self._prompts[number % len(self._prompts)]
        self._answers += 1
        try:
            got = await stream_answer(client, prompt_token_ids=prompt, adapter=_TASK, num_tokens=_NUM_TOKENS)
        except (RuntimeError, httpx.HTTPError):
            self._failed += 1
            return ""
        word = self._words[int(got.version.rpartition("@v")[2]) - 1]
        self._wrong += got.text != word * _NUM_TOKENS
        return got.version
