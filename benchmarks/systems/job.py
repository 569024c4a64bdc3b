"""What a system is asked to do and what it reports, as JSON between two processes.

Needs the standard library alone, because peers run in environments without our dependencies. Times are seconds of
`time.perf_counter` since the measured requests began.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Adapter", "Job", "Outcome", "Request", "RequestTimes", "read_job", "read_outcome", "write_json"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """One adapter. name: its task in the store; folder: its PEFT folder; rank: 0 for kinds without one."""

    name: str
    folder: str
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt. adapter: index into the job's adapters, None for the bare base."""

    prompt_token_ids: tuple[int, ...]
    adapter: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run of one system.

    compute: arithmetic or weight format, a word the system knows; base_folder: of the base, which we quantize while
    loading; copy_folder: the values this gives, as float32 safetensors; gguf: the file llama.cpp reads; home: folder of
    our store; requests: measured, at most `concurrency` at once; warm_up: answered before, other prompts with the same
    adapters; new_tokens: length of every answer.
    """

    compute: str
    base_folder: str
    copy_folder: str
    gguf: str
    home: str
    adapters: tuple[Adapter, ...]
    requests: tuple[Request, ...]
    warm_up: tuple[Request, ...]
    concurrency: int
    new_tokens: int
    warm_up_tokens: int
    threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTimes:
    """One answer. token_ids: empty where the system reports text only."""

    sent_s: float
    first_s: float
    last_s: float
    num_tokens: int
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a run took.

    ready_s: from the start of the process to the first measured request; base_mib and loaded_mib: resident memory
    before and after the adapters were loaded; peak_mib: the most resident at any time, child processes included.
    """

    requests: tuple[RequestTimes, ...]
    total_s: float
    ready_s: float
    base_mib: float
    loaded_mib: float
    peak_mib: float
    versions: dict[str, str] = field(default_factory=dict[str, str])


def write_json(value: Job | Outcome, path: Path) -> None:
    """Write a job or an outcome; the file appears whole or not at all."""
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(asdict(value)), encoding="utf-8")
    scratch.replace(path)


def read_job(path: Path) -> Job:
    """Read what `write_json` wrote."""
    raw = json.loads(path.read_text(encoding="utf-8"))
    return Job(
        **raw
        | {
            "adapters": tuple(Adapter(**one) for one in raw["adapters"]),
            "requests": tuple(_request(one) for one in raw["requests"]),
            "warm_up": tuple(_request(one) for one in raw["warm_up"]),
        }
    )


def _request(raw: dict[str, Any]) -> Request:
    return Request(prompt_token_ids=tuple(raw["prompt_token_ids"]), adapter=raw["adapter"])


def read_outcome(path: Path) -> Outcome:
    """Read what `write_json` wrote."""
    raw = json.loads(path.read_text(encoding="utf-8"))
    times = tuple(RequestTimes(**one | {"token_ids": tuple(one["token_ids"])}) for one in raw["requests"])
    return Outcome(**raw | {"requests": times})
