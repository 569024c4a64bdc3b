"""Effect reports: kept beside what was published, under the serving digest."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapterhub.errors import InvalidNameError
from adapterhub.records import EffectReport, Method, ModuleEffect, ProbeDivergence
from adapterhub.store import Store
from tests.support.peft_folders import small_base, write_folder

DIGEST = "d" * 64


def _report(kl: float) -> EffectReport:
    return EffectReport(
        method=Method.LORA,
        modules={"q_proj": ModuleEffect(rank=2, scale=2.0, relative_size=0.1)},
        unmatched_targets=("x_proj",),
        num_untouched=1,
        num_pruned=0,
        max_relative_size=0.1,
        median_relative_size=0.1,
        total_relative_size=0.1,
        probe=ProbeDivergence(prompt="x", kl=kl, max_logprob_difference=1e-300, num_tokens=3),
    )


def test_a_report_is_found_after_the_store_is_opened_again(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        assert store.find_effect(DIGEST) is None
        store.record_effect(DIGEST, _report(0.1))
        store.record_effect(DIGEST, _report(0.2))
    with Store.open(tmp_path) as store:
        assert store.find_effect(DIGEST) == _report(0.2)
        assert store.find_effect("e" * 64) is None


def test_a_report_changes_nothing_that_was_published(tmp_path: Path) -> None:
    with Store.open(tmp_path / "store") as store:
        version = store.publish(write_folder(tmp_path / "a"), task="ask", base=small_base())
        store.record_effect(version.serving_digest, _report(0.1))
        assert store.find_damage() == {}
        assert store.publish(tmp_path / "a", task="ask", base=small_base()) == version


@pytest.mark.parametrize("damaged", [b"{", b'{"kl": 1}', b"\xff"])
def test_a_report_that_does_not_parse_counts_as_none(tmp_path: Path, damaged: bytes) -> None:
    with Store.open(tmp_path) as store:
        store.record_effect(DIGEST, _report(0.1))
        (tmp_path / "effects" / f"{DIGEST}.json").write_bytes(damaged)
        assert store.find_effect(DIGEST) is None
        store.record_effect(DIGEST, _report(0.1))
        assert store.find_effect(DIGEST) == _report(0.1)


def test_only_a_digest_names_a_report(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store, pytest.raises(InvalidNameError):
        store.find_effect("../../etc/passwd")
