"""From the times of requests to the numbers of a result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.spread import percentile, spread
from benchmarks.systems.job import Outcome

__all__ = ["case_record", "equal_share", "measures"]


def measures(outcome: Outcome, *, num_adapters: int) -> dict[str, float]:
    """Rates, latencies (seconds) and memory (MiB) of one run.

    ttft: time to first token; tpot: time per output token after the first. adapter_mib: growth of resident memory per
    adapter, left out where nothing was loaded between the two readings.
    """
    times = outcome.requests
    ttft = [one.first_s - one.sent_s for one in times]
    tpot = [(one.last_s - one.first_s) / (one.num_tokens - 1) for one in times if one.num_tokens > 1]
    result = {
        "tokens_per_s": sum(one.num_tokens for one in times) / outcome.total_s,
        "total_s": outcome.total_s,
        "ttft_p50_s": percentile(ttft, 50),
        "ttft_p99_s": percentile(ttft, 99),
        "tpot_p50_s": percentile(tpot, 50),
        "tpot_p99_s": percentile(tpot, 99),
        "fewest_tokens": float(min(one.num_tokens for one in times)),
        "ready_s": outcome.ready_s,
        "peak_mib": outcome.peak_mib,
    }
    if num_adapters and outcome.loaded_mib != outcome.base_mib:
        result["adapter_mib"] = (outcome.loaded_mib - outcome.base_mib) / num_adapters
    return result


def equal_share(ours: Outcome, reference: Outcome) -> float | None:
    """Share of tokens before the first one that differs from the reference, over all answers; None without tokens.

    Greedy decoding in another order of additions may choose another token at a near tie, and then goes another way.
    """
    pairs = list(zip(ours.requests, reference.requests, strict=False))
    if not pairs or not all(one.token_ids and other.token_ids for one, other in pairs):
        return None
    equal = total = 0
    for one, other in pairs:
        total += len(other.token_ids)
        for mine, theirs in zip(one.token_ids, other.token_ids, strict=False):
            if mine != theirs:
                break
            equal += 1
    return equal / total


def case_record(
    about: Mapping[str, Any], outcomes: Sequence[Outcome], *, error: str, reference: Outcome | None
) -> dict[str, Any]:
    """One entry of a result: what was done, every repetition, their spread, and agreement with the reference."""
    repetitions = [measures(outcome, num_adapters=about["num_adapters"]) for outcome in outcomes]
    return {
        **about,
        "repetitions": repetitions,
        "spread": spread(repetitions),
        "equal_tokens": equal_share(outcomes[0], reference) if outcomes and reference else None,
        "error": error,
        "versions": outcomes[0].versions if outcomes else {},
    }
