"""Which work each system gets, and what wrong options are told."""

from __future__ import annotations

import pytest

from adapterhub.errors import UserInputError
from benchmarks.options import build_config
from benchmarks.plan import ServingConfig, build_job, list_cases, open_runs, requests_of


def labels(**options):
    return [case.label for case in list_cases(build_config(options, ServingConfig))]


def test_each_system_gets_only_the_work_it_can_do():
    assert labels(systems=("peft", "llama.cpp-q4_1"), adapters=("1", "16", "64")) == [
        "peft-lora-1",
        "peft-lora-16",
        "llama.cpp-q4_1-single-0",
        "llama.cpp-q4_1-base-0",
    ]


def test_one_adapter_is_no_mixture_of_kinds():
    assert labels(systems=("ours-float32",), kinds=("mixed",), adapters=("1", "4")) == ["ours-float32-mixed-4"]


def test_every_case_has_a_label_of_its_own():
    found = labels()
    assert len(found) == len(set(found)) > 30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"systems": ("pefft",)},
            r"--systems is \('pefft',\): there is no system 'pefft'; choose from ours-float32, .*Did you mean 'peft'\?",
        ),
        ({"adapters": ("0",)}, r"--adapters is \('0',\): 0 adapters are none or too many; give 1 to 256"),
        ({"adapters": ("many",)}, r"--adapters is \('many',\): Input should be a valid integer"),
        ({"repetitions": "0"}, r"--repetitions is '0': Input should be greater than or equal to 1"),
        ({"new_tokens": "1"}, r"--new-tokens is '1': Input should be greater than or equal to 2"),
        ({"kinds": ("dense",)}, r"--kinds is \('dense',\): Input should be 'single', 'base', 'lora' or 'mixed'"),
    ],
)
def test_a_wrong_option_is_named_with_its_value_and_what_is_allowed(options, message):
    with pytest.raises(UserInputError, match=message):
        build_config(options, ServingConfig)


def test_a_comparison_without_any_case_is_refused():
    config = build_config({"systems": ("peft",), "kinds": ("mixed",)}, ServingConfig)
    with pytest.raises(UserInputError, match=r"None of peft does mixed with 1, 4, 16, 64 adapters.*catalogue\.py"):
        list_cases(config)


def test_requests_take_the_adapters_in_turn_and_there_are_as_many_as_adapters():
    config = build_config({"num_requests": "4", "systems": ("ours-float32",)}, ServingConfig)
    prompts = [(idx,) for idx in range(100)]
    cases = {case.label: case for case in list_cases(config)}
    few = requests_of(cases["ours-float32-lora-1"], config, prompts)
    many = requests_of(cases["ours-float32-lora-16"], config, prompts)
    base = requests_of(cases["ours-float32-base-0"], config, prompts)
    assert [one.adapter for one in few] == [0, 0, 0, 0]
    assert [one.adapter for one in many] == list(range(16))
    assert [one.adapter for one in base] == [None] * 4


def test_the_warm_up_never_sees_a_measured_prompt():
    config = build_config({"systems": ("ours-float32",)}, ServingConfig)
    prompts = [(idx,) for idx in range(128)]
    for case in list_cases(config):
        job = build_job(case, config, prompts, adapters=(), base_folder="", copy_folder="", gguf="", home="")
        measured = {one.prompt_token_ids for one in job.requests}
        assert measured.isdisjoint(one.prompt_token_ids for one in job.warm_up)
        assert len(job.requests) == len(job.warm_up)


def test_a_comparison_continues_with_more_systems_but_not_with_other_options_or_another_base(tmp_path):
    folder = tmp_path / "runs" / "name"
    open_runs(folder, build_config({"systems": ("peft",)}, ServingConfig), base_digest="a")
    open_runs(folder, build_config({"systems": ("ours-int8",), "repetitions": "9"}, ServingConfig), base_digest="a")
    message = r"name' holds runs with other options or another base: .*\"base_digest\": \"a\".* with --fresh\."
    with pytest.raises(UserInputError, match=message):
        open_runs(folder, build_config({}, ServingConfig), base_digest="b")
    with pytest.raises(UserInputError, match=r'"new_tokens": 64.*, not .*"new_tokens": 8'):
        open_runs(folder, build_config({"new_tokens": "8"}, ServingConfig), base_digest="a")
