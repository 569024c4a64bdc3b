"""Percentiles and spreads. Oracle: numpy's nearest-rank method, and plain arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.spread import percentile, spread


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.integers(0, 100))
def test_a_percentile_is_the_nearest_ranked_value_that_was_measured(values, percent):
    assert percentile(values, percent) == np.percentile(values, percent, method="inverted_cdf")


def test_the_99th_percentile_of_few_values_is_the_worst_of_them():
    assert percentile([0.1, 5.0, 0.2], 99) == 5.0


def test_a_percentile_of_nothing_is_refused():
    with pytest.raises(ValueError, match="No values, so no percentile"):
        percentile([], 50)


def test_a_percent_above_100_is_refused():
    with pytest.raises(ValueError, match=r"percent is 101; it lies between 0 and 100"):
        percentile([1.0], 101)


def test_a_spread_gives_lowest_middle_and_highest_of_each_metric():
    repetitions = [{"rate": 3.0, "s": 1.0}, {"rate": 9.0, "s": 1.0}, {"rate": 4.0, "s": 1.0}]
    assert spread(repetitions) == {
        "rate": {"min": 3.0, "median": 4.0, "max": 9.0},
        "s": {"min": 1.0, "median": 1.0, "max": 1.0},
    }
    assert spread([]) == {}
