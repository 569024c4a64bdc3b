"""Measure this project and its peers side by side: same prompts, same machine, one process per run.

    python -m benchmarks.serving                                     # everything, three times, interleaved
    python -m benchmarks.serving --systems ours-float32,peft --adapters 1,16 --repetitions 1 --new-tokens 16 --out FILE

Every repetition runs all cases once, so that a slow hour touches all systems alike. A finished run is kept in
`--cache`/runs/<name>: started again with the same options, the command continues where it was stopped, and tries failed
runs again. The result is written after every run. Peers need `python -m benchmarks.peers.build` once. All systems
compute with the values of one NF4 base: ours keep them in 4 bits, peers as float32.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterhub.assets import fetch_asset
from adapterhub.base.catalogue import CATALOGUE
from adapterhub.base.identity import Base
from adapterhub.errors import AdapterHubError, UserInputError
from adapterhub.settings import Settings, load_settings
from benchmarks.adapters import adapter_set, publish_all, write_missing
from benchmarks.base_copy import base_cache, benchmark_base, write_copy, write_gguf
from benchmarks.machine import describe_machine, describe_revision
from benchmarks.measures import case_record, measures
from benchmarks.options import add_options, check_options
from benchmarks.peers.build import DEFAULT_CACHE, peer_python
from benchmarks.plan import Case, ServingConfig, build_job, list_cases, open_runs
from benchmarks.systems.catalogue import System
from benchmarks.systems.job import Adapter, Outcome, read_outcome, write_json
from benchmarks.workload import load_prompts

__all__ = ["main", "measure"]

_ROOT = Path(__file__).parents[1]
_RESULT = Path(__file__).parent / "results" / "serving-batch.json"
_TIMEOUT_S = 1800  # The slowest run, with a compiler's first start, takes a tenth of this on two cores.
# Whose greedy tokens the others should give: plain transformers for the base, PEFT for adapters.
_REFERENCES = {"single": "transformers", "base": "transformers", "lora": "peft"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bench:
    """Everything the runs share.

    copy: float32 values of the base; ggufs: by system; home: of what fits this base, our store among it; folder: of the
    runs.
    """

    config: ServingConfig
    cases: list[Case]
    prompts: list[tuple[int, ...]]
    base: Base
    copy: Path
    ggufs: Mapping[str, Path]
    cache: Path
    home: Path
    folder: Path


def measure(config: ServingConfig, *, cache: Path, name: str, out: Path, settings: Settings) -> list[str]:
    """Run what is not done yet, writing `out` after every run; return what failed."""
    bench = _prepare(config, cache=cache, name=name, settings=settings)
    errors: dict[str, str] = {}
    total = config.repetitions * len(bench.cases)
    for done in range(total):
        repetition, case = done // len(bench.cases), bench.cases[done % len(bench.cases)]
        outcome_path = _outcome_path(bench, case, repetition)
        began = time.perf_counter()
        if not outcome_path.is_file():
            error = _run(bench, case, outcome_path)
            if error:
                errors[case.label] = error
        shown = "FAILED" if not outcome_path.is_file() else _shown(case, read_outcome(outcome_path))
        took_s = time.perf_counter() - began
        print(f"[{done + 1}/{total}] repetition {repetition + 1} {case.label}: {shown} ({took_s:.0f} s)", flush=True)
        _write_result(bench, errors, out)
    return [f"{label}: {error}" for label, error in errors.items()]


def _prepare(config: ServingConfig, *, cache: Path, name: str, settings: Settings) -> _Bench:
    cases = list_cases(config)
    for peer in sorted({case.system.peer for case in cases if case.system.peer}):
        if peer_python(peer, cache) is None:
            raise UserInputError(
                f"The environment of {peer!r} is not in {str(cache)!r}.",
                f"Build it with `python -m benchmarks.peers.build {peer}`, or leave its systems out with --systems.",
            )
    base = benchmark_base(settings)
    folder = cache / "runs" / name
    open_runs(folder, config, base_digest=base.digest)
    ggufs = {
        case.system.name: _gguf(case.system, base, cache, settings) for case in cases if case.system.peer == "llama_cpp"
    }
    num_prompts = 2 * max([config.num_requests, config.single_requests, *(case.num_adapters for case in cases)])
    home = base_cache(base, cache)
    adapters = [adapter for case in cases for adapter in _adapters_of(case, home)]
    unique = list({adapter.name: adapter for adapter in adapters}.values())
    write_missing(unique, base)
    publish_all(unique, base, home=home)
    prompts = load_prompts(base, settings, num_prompts=num_prompts)
    return _Bench(
        config=config,
        cases=cases,
        prompts=prompts,
        base=base,
        copy=write_copy(base, cache),
        ggufs=ggufs,
        cache=cache,
        home=home,
        folder=folder,
    )


def _gguf(system: System, base: Base, cache: Path, settings: Settings) -> Path:
    """Return the file llama.cpp reads: the base's values in float32, or its own 4-bit weights as they were published.

    Raises UserInputError for a base without a GGUF file.
    """
    if settings.base not in CATALOGUE:
        raise UserInputError(
            f"Base {settings.base!r} has no GGUF file, which llama.cpp needs.",
            f"Leave llama.cpp out with --systems, or measure one of: {', '.join(CATALOGUE)}.",
        )
    published = fetch_asset(CATALOGUE[settings.base], settings.assets_dir)
    return write_gguf(base, cache, original=published) if system.compute == "float32" else published


def _adapters_of(case: Case, home: Path) -> tuple[Adapter, ...]:
    return adapter_set("mixed" if case.kind == "mixed" else "lora", case.num_adapters, folder=home)


def _outcome_path(bench: _Bench, case: Case, repetition: int) -> Path:
    return bench.folder / f"{case.label}-{repetition}.json"


def _run(bench: _Bench, case: Case, outcome_path: Path) -> str:
    """Run one case in a process of its own; return what went wrong, nothing when all went well."""
    job = build_job(
        case,
        bench.config,
        bench.prompts,
        adapters=_adapters_of(case, bench.home),
        base_folder=str(bench.base.folder),
        copy_folder=str(bench.copy),
        gguf=str(bench.ggufs.get(case.system.name, "")),
        home=str(bench.home),
    )
    job_path = outcome_path.with_suffix(".job")
    write_json(job, job_path)
    python = sys.executable if case.system.peer is None else str(peer_python(case.system.peer, bench.cache))
    command = [python, "-m", "benchmarks.systems.worker", case.system.module, str(job_path), str(outcome_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(bench.config.threads)}
    log = outcome_path.with_suffix(".log")
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, cwd=_ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return f"no end after {_TIMEOUT_S} s; see {log}"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # The group is the session started above: its children too.
                process.wait()
    if outcome_path.is_file():
        return ""
    last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:] or ["no output"]
    return f"exit code {process.returncode}, {last[0][:300]}; see {log}"


def _shown(case: Case, outcome: Outcome) -> str:
    numbers = measures(outcome, num_adapters=case.num_adapters)
    return f"{numbers['tokens_per_s']:.1f} tokens/s, first token {numbers['ttft_p50_s']:.2f} s"


def _write_result(bench: _Bench, errors: dict[str, str], out: Path) -> None:
    outcomes = {
        case.label: [
            read_outcome(path)
            for repetition in range(bench.config.repetitions)
            if (path := _outcome_path(bench, case, repetition)).is_file()
        ]
        for case in bench.cases
    }
    records: list[dict[str, Any]] = []
    for case in bench.cases:
        theirs = outcomes.get(f"{_REFERENCES.get(case.kind, '')}-{case.kind}-{case.num_adapters}")
        about = {
            "label": case.label,
            "system": case.system.name,
            "kind": case.kind,
            "num_adapters": case.num_adapters,
            "note": case.system.note,
        }
        reference = theirs[0] if theirs else None
        error = errors.get(case.label, "").replace(str(bench.cache), "CACHE")
        records.append(case_record(about, outcomes[case.label], error=error, reference=reference))
    lengths = sorted(len(prompt) for prompt in bench.prompts)
    result = {
        "revision": describe_revision(),
        "machine": describe_machine(),
        "base": bench.base.name,
        "base_digest": bench.base.digest,
        "quantization": bench.base.quantization,
        "config": bench.config.model_dump(mode="json"),
        "prompt_tokens": {"min": lengths[0], "median": lengths[len(lengths) // 2], "max": lengths[-1]},
        "cases": records,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the result; exits with 1 when a run failed, with 2 for wrong options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="folder of environments, adapters and runs")
    parser.add_argument("--name", help="name of this comparison; the revision by default")
    parser.add_argument("--fresh", action="store_true", help="forget the runs of that name")
    parser.add_argument("--out", type=Path, default=_RESULT)
    add_options(parser, ServingConfig)
    parsed = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # An exception, so that runs end too.
    try:
        config = check_options(parsed, ServingConfig)
        name = parsed.name or describe_revision()
        if parsed.fresh:
            shutil.rmtree(parsed.cache / "runs" / name, ignore_errors=True)
        failed = measure(config, cache=parsed.cache, name=name, out=parsed.out, settings=load_settings())
    except AdapterHubError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(f"Written: {parsed.out}")
    if failed:
        sys.exit("Failed runs, tried again by the same command:\n  " + "\n  ".join(failed))


if __name__ == "__main__":
    main()
