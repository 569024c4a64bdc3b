"""Small statistics: percentiles of one run, and how far repetitions of a run lie apart."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

__all__ = ["percentile", "spread"]


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the smallest value that at least `percent` % of the values do not exceed (nearest rank).

    Never a number that was not measured. Raises ValueError for no values or a percent outside 0 to 100.
    """
    if not values:
        raise ValueError("No values, so no percentile.")
    if not 0 <= percent <= 100:
        raise ValueError(f"percent is {percent!r}; it lies between 0 and 100.")
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


def spread(repetitions: Sequence[dict[str, float]]) -> dict[str, dict[str, Any]]:
    """Return {metric: {min, median, max}} over repetitions that have the same metrics."""
    return {
        metric: {
            "min": min(one[metric] for one in repetitions),
            "median": statistics.median(one[metric] for one in repetitions),
            "max": max(one[metric] for one in repetitions),
        }
        for metric in (repetitions[0] if repetitions else {})
    }
