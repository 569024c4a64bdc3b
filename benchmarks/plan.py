"""Which systems do which work how often: the configuration of `benchmarks.serving`, its cases and their folder."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, field_validator

from adapterhub.errors import UserInputError, suggest
from benchmarks.systems.catalogue import SYSTEMS, Kind, System
from benchmarks.systems.job import Adapter, Job, Request

__all__ = ["Case", "ServingConfig", "build_job", "list_cases", "open_runs", "requests_of"]

_FEWEST_MIXED = 2  # One adapter is not a mixture.


class ServingConfig(BaseModel):
    """One comparison. adapters: numbers of distinct adapters; each request of a case has the next one in turn."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    systems: tuple[str, ...] = Field(default=tuple(SYSTEMS), min_length=1)
    kinds: tuple[Kind, ...] = Field(default=("single", "base", "lora", "mixed"), min_length=1)
    adapters: tuple[int, ...] = (1, 4, 16, 64)
    repetitions: int = Field(default=3, ge=1, le=100)
    num_requests: int = Field(default=16, ge=1, le=256, description="Requests of a case, or its adapters if more.")
    concurrency: int = Field(default=16, ge=1, le=32, description="Requests in flight; 32 is our engine's batch.")
    single_requests: int = Field(default=4, ge=1, le=256, description="Requests one at a time, in `single` cases.")
    new_tokens: int = Field(default=64, ge=2, le=256)
    warm_up_tokens: int = Field(default=8, ge=2, le=64)
    threads: int = Field(default_factory=lambda: os.cpu_count() or 1, ge=1)

    @field_validator("systems")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in SYSTEMS:
                near = suggest(name, SYSTEMS, otherwise="")
                raise ValueError(f"there is no system {name!r}; choose from {', '.join(SYSTEMS)}. {near}".rstrip())
        return names

    @field_validator("adapters")
    @classmethod
    def _positive(cls, counts: tuple[int, ...]) -> tuple[int, ...]:
        for count in counts:
            if not 1 <= count <= 256:
                raise ValueError(f"{count} adapters are none or too many; give 1 to 256")
        return counts


@dataclass(frozen=True, slots=True)
class Case:
    """One system doing one kind of work."""

    system: System
    kind: Kind
    num_adapters: int

    @property
    def label(self) -> str:
        """Unique, and fit for a file name."""
        return f"{self.system.name}-{self.kind}-{self.num_adapters}"


def list_cases(config: ServingConfig) -> list[Case]:
    """Every case that the chosen systems can do, in the order of one repetition. Raises UserInputError for none."""
    cases: list[Case] = []
    for name in config.systems:
        system = SYSTEMS[name]
        for kind in system.kinds:
            if kind not in config.kinds:
                continue
            counts: tuple[int, ...] = (0,)
            if kind in ("lora", "mixed"):
                counts = tuple(count for count in config.adapters if count in system.adapter_counts)
            if kind == "mixed":
                counts = tuple(count for count in counts if count >= _FEWEST_MIXED)
            cases += [Case(system, kind, count) for count in counts]
    if not cases:
        raise UserInputError(
            f"None of {', '.join(config.systems)} does {', '.join(config.kinds)} with "
            f"{', '.join(map(str, config.adapters))} adapters.",
            "See `benchmarks/systems/catalogue.py` for what each system is measured with.",
        )
    return cases


def open_runs(folder: Path, config: ServingConfig, *, base_digest: str) -> None:
    """Make the folder of a comparison, or continue in it. Raises UserInputError when it holds runs that differ.

    Other systems, kinds, numbers of adapters and more repetitions may join a comparison; all else must be the same.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stamp = folder / "config.json"
    options = config.model_dump(mode="json", exclude={"systems", "kinds", "adapters", "repetitions"})
    wanted = json.dumps(options | {"base_digest": base_digest})
    if stamp.is_file() and (found := stamp.read_text(encoding="utf-8")) != wanted:
        raise UserInputError(
            f"{str(folder)!r} holds runs with other options or another base: {found}, not {wanted}.",
            "Give this comparison another --name, or remove those runs with --fresh.",
        )
    stamp.write_text(wanted, encoding="utf-8")


def requests_of(case: Case, config: ServingConfig, prompts: list[tuple[int, ...]]) -> tuple[Request, ...]:
    """Give each prompt the next adapter in turn; prompts are taken from the front of the list."""
    count = config.single_requests if case.kind == "single" else max(config.num_requests, case.num_adapters)
    return tuple(
        Request(prompt_token_ids=prompt, adapter=idx % case.num_adapters if case.num_adapters else None)
        for idx, prompt in enumerate(prompts[:count])
    )


def build_job(
    case: Case,
    config: ServingConfig,
    prompts: list[tuple[int, ...]],
    *,
    adapters: tuple[Adapter, ...],
    base_folder: str,
    copy_folder: str,
    gguf: str,
    home: str,
) -> Job:
    """Write the job of a case. The second half of `prompts` warms up."""
    half = len(prompts) // 2
    return Job(
        compute=case.system.compute,
        adapters=adapters,
        requests=requests_of(case, config, prompts[:half]),
        warm_up=requests_of(case, config, prompts[half:]),
        concurrency=1 if case.kind == "single" else config.concurrency,
        new_tokens=config.new_tokens,
        warm_up_tokens=config.warm_up_tokens,
        threads=config.threads,
        base_folder=base_folder,
        copy_folder=copy_folder,
        gguf=gguf,
        home=home,
    )
