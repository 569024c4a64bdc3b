"""Traffic of the churn benchmark: who asks when, for which adapter."""

from __future__ import annotations

from collections import Counter

import pytest

from adapterhub.errors import UserInputError
from benchmarks.churn import ChurnConfig, arrivals, zipf_choices
from benchmarks.options import build_config, run_command


def test_popularity_falls_with_rank_as_the_law_says():
    counts = Counter(zipf_choices(100, 50_000, skew=1.0, seed=0))
    assert counts[0] / counts[9] == pytest.approx(10, rel=0.15)
    assert max(counts) < 100


def test_without_skew_all_adapters_are_equally_popular():
    counts = Counter(zipf_choices(10, 50_000, skew=0.0, seed=0))
    assert min(counts.values()) / max(counts.values()) > 0.9


def test_requests_arrive_in_order_at_the_wanted_rate():
    times = arrivals(20_000, rate_per_s=4.0, seed=0)
    assert times == sorted(times)
    assert times[-1] == pytest.approx(5_000, rel=0.05)


def test_equal_seeds_give_equal_traffic():
    assert arrivals(50, rate_per_s=1.0, seed=3) == arrivals(50, rate_per_s=1.0, seed=3)
    assert zipf_choices(9, 50, skew=1.0, seed=3) == zipf_choices(9, 50, skew=1.0, seed=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapters": "1025"}, r"--adapters is '1025': Input should be less than or equal to 1024"),
        ({"load": "0"}, r"--load is '0': Input should be greater than 0"),
        ({"slots": "some"}, r"--slots is 'some': Input should be a valid integer"),
    ],
)
def test_a_wrong_option_is_named(options, message):
    with pytest.raises(UserInputError, match=message):
        build_config(options, ChurnConfig)


def test_a_measurement_gets_what_the_command_line_says_and_wrong_options_end_with_two(tmp_path, capsys):
    seen = []

    def measure(config, /, *, settings, cache, out):
        assert settings.home.is_absolute()
        seen.append((config.adapters, cache, out))
        if config.adapters == 5:
            raise UserInputError("Five are wrong.", "Take four.")

    def run(*arguments):
        run_command(measure, ChurnConfig, arguments, about=None, cache_help="", result=tmp_path / "default.json")

    run("--adapters", "4", "--cache", str(tmp_path))
    assert seen == [(4, tmp_path, tmp_path / "default.json")]
    assert capsys.readouterr().out == f"Written: {tmp_path / 'default.json'}\n"
    for wrong, message in (("1025", "--adapters is '1025'"), ("5", "Five are wrong. Take four.")):
        with pytest.raises(SystemExit, match="2"):
            run("--adapters", wrong)
        assert message in capsys.readouterr().err
