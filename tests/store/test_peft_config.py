"""The adapter configuration: what is kept, what is dropped, what is refused, and that its meaning is PEFT's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftConfig, VeraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists

from adapterhub.base.identity import Base
from adapterhub.base.loading import load_model
from adapterhub.errors import AdapterConfigError
from adapterhub.peft_format import AdapterConfig, parse_adapter_config
from adapterhub.records import Method
from tests.support.adapters import METHODS, open_with_peft, write_adapter
from tests.support.peft_folders import LORA_CONFIG
from tests.support.tiny_models import build_base

LAYERS = [f"model.layers.{idx}." for idx in (0, 1, 10)]
NAMES = [layer + leaf for layer in LAYERS for leaf in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")]


def _config(**changes: Any) -> AdapterConfig:
    return parse_adapter_config(LORA_CONFIG | changes)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return build_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize(
    "peft_config",
    [
        LoraConfig(target_modules=["q_proj"]),
        IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        AdaLoraConfig(target_modules=["q_proj"], total_step=10),
        VeraConfig(target_modules=["q_proj"]),
    ],
)
def test_every_key_peft_writes_is_known(peft_config: PeftConfig, tmp_path: Path) -> None:
    peft_config.save_pretrained(str(tmp_path))
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    assert parse_adapter_config(raw).target_modules == ("q_proj",)


@pytest.mark.parametrize("peft_type", ["LORA", "IA3", "ADALORA", "VERA"])
@given(key=st.text(min_size=1, max_size=20), value=st.none() | st.integers() | st.text(max_size=5))
def test_an_unknown_key_is_refused_by_name(peft_type: str, key: str, value: object) -> None:
    raw = {"peft_type": peft_type, "target_modules": ["q_proj"]}
    key = f"x-{key}"
    with pytest.raises(AdapterConfigError) as caught:
        parse_adapter_config(raw | {key: value})
    assert f"has the key {key!r} = {value!r}, unknown for {peft_type}." in caught.value.what


def test_a_misspelt_key_gets_a_suggestion() -> None:
    with pytest.raises(AdapterConfigError, match="Did you mean 'use_rslora'"):
        _config(use_rs_lora=True)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bias", "all"), ("bias", "lora_only"), ("bias", None), ("modules_to_save", ["lm_head"]),
        ("fan_in_fan_out", True),
        ("layer_replication", [[0, 2]]), ("use_qalora", True), ("lora_bias", True), ("trainable_token_indices", [1]),
        ("megatron_config", {"a": 1}), ("alora_invocation_tokens", [1]), ("target_parameters", ["w"]),
        ("use_bdlora", True), ("arrow_config", {"a": 1}), ("kasa_config", {"a": 1}), ("velora_config", {"a": 1}),
        ("monteclora_config", {"a": 1}), ("ensure_weight_tying", True),
    ],
)  # fmt: skip
def test_a_feature_that_is_not_served_is_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(AdapterConfigError) as caught:
        _config(**{key: value})
    assert str(caught.value) == (
        f"adapter_config.json sets {key!r} to {value!r}; allowed: off. "
        f"AdapterHub does not serve {key!r}; train the adapter without it."
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "'peft_type' to 'LOHA'; allowed: ADALORA, IA3, LORA, VERA."),
        ({"peft_type": None}, "'peft_type' to None"),
        ({"peft_type": ["LORA"]}, "'peft_type' to ['LORA']"),
        ({"task_type": "SEQ_CLS"}, "'task_type' to 'SEQ_CLS'; allowed: CAUSAL_LM or none."),
        ({"r": 0}, "'r' to 0; allowed: an integer from 1 to 2048."),
        ({"r": 2049}, "'r' to 2049; allowed: an integer from 1 to 2048."),
        ({"r": True}, "'r' to True"),
        ({"r": 8.0}, "'r' to 8.0"),
        ({"lora_alpha": 0}, "'lora_alpha' to 0; allowed: a finite number above 0."),
        ({"lora_alpha": float("inf")}, "'lora_alpha' to inf"),
        ({"lora_alpha": "16"}, "'lora_alpha' to '16'"),
        ({"use_dora": 1}, "'use_dora' to 1; allowed: true or false."),
        ({"target_modules": None}, "'target_modules' to None; allowed: names or a pattern."),
        ({"target_modules": []}, "'target_modules' to []"),
        ({"target_modules": [1]}, "'target_modules' to [1]; allowed: a list of names or one regular expression."),
        ({"target_modules": "(q"}, "'target_modules' to '(q'; allowed: a regular expression."),
        ({"target_modules": "(a+)+b"}, "allowed: no repeated group and at most 1,000,000 ways to match"),
        ({"target_modules": "a?" * 30 + "a"}, "ways to match, a repetition counting as 10."),
        ({"target_modules": "(?:.|.)" * 40 + "!"}, "ways to match, a repetition counting as 10."),
        ({"target_modules": r"([a-z_.0-9]+|\\)+!"}, "allowed: no repeated group"),
        ({"target_modules": "(?x)([a-z_.0-9]+) +!"}, "allowed: plain groups, (...) or (?:...)."),
        ({"target_modules": r"\\(?x:([a-z_.0-9]+) +!)"}, "allowed: plain groups, (...) or (?:...)."),
        ({"rank_pattern": {"(?i)q_proj": 4}}, "'rank_pattern' to '(?i)q_proj'; allowed: plain groups"),
        ({"alpha_pattern": {"(?=q)q_proj": 4}}, "'alpha_pattern' to '(?=q)q_proj'; allowed: plain groups"),
        ({"layers_pattern": ["(?P<idx>h)"]}, "'layers_pattern' to '(?P<idx>h)'; allowed: plain groups"),
        ({"target_modules": "a{99999999999}"}, "'a{99999999999}'; allowed: a regular expression."),
        ({"target_modules": "(" * 1900 + ")" * 1900}, "allowed: a regular expression."),
        ({"rank_pattern": {f"m{idx}": 4 for idx in range(513)}}, "to 513 patterns; allowed: at most 512"),
        ({"rank_pattern": {f".*.*.*.*.*.{idx}": 4 for idx in range(11)}}, "'rank_pattern' to 11 patterns; allowed: "),
        ({"layers_pattern": ["h"] * 513}, "'layers_pattern' to 513 patterns; allowed: at most 512,"),
        ({"target_modules": "x" * 4001}, "allowed: a text of at most 4000 characters."),
        ({"rank_pattern": {"(a*)*": 4}}, "'rank_pattern' to '(a*)*'"),
        ({"rank_pattern": {"q_proj": 0}}, "'q_proj' to 0; allowed: an integer from 1 to 2048."),
        ({"rank_pattern": [1]}, "'rank_pattern' to [1]; allowed: an object."),
        ({"alpha_pattern": {"q_proj": -1}}, "'q_proj' to -1; allowed: a finite number above 0."),
        ({"layers_to_transform": [-1]}, "'layers_to_transform' to [-1]; allowed: layer numbers from 0."),
        ({"layers_pattern": 3}, "'layers_pattern' to 3; allowed: names."),
        ({"target_modules": "q", "layers_to_transform": [1]}, "allowed: nothing beside a `target_modules` pattern."),
        ({"auto_mapping": {"parent_library": "evil.module"}}, "allowed: none, or a class of transformers."),
        ({"auto_mapping": "x"}, "'auto_mapping' to 'x'"),
        ({"init_lora_weights": "pissa"}, "to 'pissa'; allowed: true, false, gaussian, eva, orthogonal."),
        ({"init_lora_weights": "olora"}, "'init_lora_weights' to 'olora'"),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_refused_with_what_is_allowed(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterConfigError) as caught:
        _config(**changes)
    assert message in caught.value.what
    assert caught.value.hint


@pytest.mark.parametrize("pattern", [r".*\.(?:0|1)\.(self_attn|mlp)\.[qkv(?]_proj", r"model\.layers\.\d+\..*q_proj.*"])
def test_a_pattern_that_ends_soon_is_kept(pattern: str) -> None:
    config = _config(target_modules=pattern, rank_pattern={pattern: 3}, alpha_pattern={pattern: 6})
    assert (config.is_target(NAMES[0]), config.rank_of(NAMES[0]), config.scale_of(NAMES[0])) == (True, 3, 2.0)


def test_a_layers_pattern_with_a_choice_selects_only_what_has_a_layer_number() -> None:
    config = _config(target_modules=["q_proj"], layers_to_transform=[0], layers_pattern=["model|layers"])
    assert not config.is_target("model.norm.q_proj")


def test_a_long_value_is_shortened_in_the_message() -> None:
    with pytest.raises(AdapterConfigError) as caught:
        _config(modules_to_save=["x" * 1000])
    assert len(caught.value.what) < 250


@pytest.mark.parametrize("mask", [[True], "all", [1, 0]])
def test_an_adalora_rank_pattern_needs_one_boolean_per_rank(mask: object) -> None:
    with pytest.raises(AdapterConfigError, match=r"'rank_pattern\[x.lora_E\]' to .*; allowed: 2 booleans"):
        parse_adapter_config(
            {"peft_type": "ADALORA", "init_r": 2, "target_modules": ["x"], "rank_pattern": {"x.lora_E": mask}}
        )


def test_what_only_matters_in_training_does_not_change_the_canonical_form() -> None:
    noisy = _config(
        lora_dropout=0.5, init_lora_weights="gaussian", inference_mode=True, revision="main", peft_version="0.19.0",
        base_model_name_or_path="someone/else", target_modules=["v_proj", "q_proj"], task_type=None,
        auto_mapping={"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama"},
    )  # fmt: skip
    assert noisy == _config()
    assert noisy.canonical() == _config().canonical()


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 4},
        {"lora_alpha": 5},
        {"use_rslora": True},
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 4}},
        {"alpha_pattern": {"q_proj": 4}},
        {"target_modules": ["q_proj"]},
    ],
)
def test_what_changes_outputs_changes_the_canonical_form(changes: dict[str, Any]) -> None:
    assert _config(**changes).canonical() != _config().canonical()


def test_the_vera_key_matters_only_when_the_projections_are_drawn_from_it() -> None:
    raw = {"peft_type": "VERA", "r": 4, "target_modules": ["q_proj"]}
    saved = [parse_adapter_config(raw | {"projection_prng_key": key}).canonical() for key in (0, 1)]
    drawn = [
        parse_adapter_config(raw | {"projection_prng_key": key, "save_projection": False}).canonical() for key in (0, 1)
    ]
    assert saved[0] == saved[1]
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"method": "dora"},
        {"rank_pattern": {"q_proj": 3, "layers.1.mlp.*": 5}, "alpha_pattern": {"v_proj": 7}},
        {"rank_pattern": {"model.layers.0.mlp.down_proj": 6}, "use_rslora": True},
        {"target_modules": r".*\.[qv]_proj"},
        {"target_modules": "all-linear", "exclude_modules": ["o_proj"]},
        {"layers_to_transform": [1], "layers_pattern": "layers"},
        {"layers_to_transform": 0},
    ],
)
def test_targets_ranks_and_scales_are_those_of_peft(options: dict[str, Any], tiny: Base, tmp_path: Path) -> None:
    options = {"target_modules": ["q_proj", "v_proj", "down_proj"], "lora_alpha": 6} | options
    folder = write_adapter(tmp_path, tiny, method=options.pop("method", "lora"), rank=4, **options)
    model = open_with_peft(load_model(tiny), folder)
    config = parse_adapter_config(json.loads((folder / "adapter_config.json").read_text()))
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }
    assert {name for name in tiny.modules if config.is_target(name)} == set(layers)
    for name, layer in layers.items():
        assert (config.rank_of(name), config.scale_of(name)) == (layer.r["default"], layer.scaling["default"])


def test_the_scale_of_adalora_divides_by_the_rank_before_pruning() -> None:
    masks = {f"{NAMES[0]}.lora_E": [True, False, False, False], f"{NAMES[1]}.lora_E": [False] * 4}
    config = parse_adapter_config(
        {"peft_type": "ADALORA", "init_r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], "rank_pattern": masks}
    )
    assert [config.rank_of(name) for name in NAMES[:3]] == [1, 0, 4]
    assert config.scale_of(NAMES[0]) == 6 / (4 + 1e-5)


def test_ia3_scales_inputs_of_feedforward_modules_only() -> None:
    raw = {"peft_type": "IA3", "target_modules": ["k_proj", "down_proj"]}
    by_name = parse_adapter_config(raw | {"feedforward_modules": ["down_proj"]})
    by_pattern = parse_adapter_config(raw | {"feedforward_modules": r".*\.mlp\..*"})
    for config in (by_name, by_pattern):
        assert config.is_feedforward(NAMES[2])
        assert not config.is_feedforward(NAMES[0])
        assert (config.rank_of(NAMES[0]), config.scale_of(NAMES[0])) == (0, 1.0)


@given(
    targets=st.lists(
        st.sampled_from(["q_proj", "proj", "mlp.down_proj", "model", "0.self_attn.v_proj", NAMES[0]]), min_size=1
    ),
    excluded=st.none() | st.lists(st.sampled_from(["v_proj", "self_attn.q_proj", NAMES[2]])) | st.just(r".*\.1\..*"),
    layers=st.none() | st.integers(0, 11) | st.lists(st.sampled_from([0, 1, 10])),
    pattern=st.none() | st.sampled_from(["layers", "h"]) | st.just(["h", "layers"]),
)
def test_a_list_of_targets_selects_what_peft_selects(
    targets: list[str], excluded: Any, layers: Any, pattern: Any
) -> None:
    options = {"target_modules": targets, "exclude_modules": excluded, "layers_to_transform": layers}
    if layers is not None:
        options["layers_pattern"] = pattern
    reference = LoraConfig(**options)
    config = parse_adapter_config({"peft_type": "LORA"} | options)
    for name in NAMES:
        expected = bool(check_target_module_exists(reference, name))
        assert config.is_target(name) == expected, name


@pytest.mark.parametrize("method", METHODS)
def test_the_normalised_configuration_says_the_same(method: str, tiny: Base, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, tiny, method=method, rank=4, pruned=method == "adalora")
    config = parse_adapter_config(json.loads((folder / "adapter_config.json").read_text()))
    assert config.method is Method(method)
    assert parse_adapter_config(config.to_peft()) == config
