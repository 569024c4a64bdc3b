"""Tensors and modules: an adapter that fits only in part is refused, by name."""

from __future__ import annotations

from typing import Any

import pytest

from adapterhub.errors import AdapterMismatchError
from adapterhub.peft_format import ModuleTensors, TensorInfo, map_tensors, parse_adapter_config
from tests.support.peft_folders import LORA_CONFIG, MODULES, lora_tensors

Q, V, DOWN = MODULES
PREFIX = "base_model.model."


def _infos(shapes: dict[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    return {name: TensorInfo("F32", shape) for name, shape in shapes.items()}


LORA = {name: tensor.shape for name, tensor in lora_tensors().items()}


def _map(shapes: dict[str, tuple[int, ...]], **changes: Any) -> dict[str, ModuleTensors]:
    return map_tensors(parse_adapter_config(LORA_CONFIG | changes), _infos(shapes), MODULES)


def test_every_tensor_is_assigned_to_its_module() -> None:
    mapped = _map(LORA)
    assert mapped == {
        name: ModuleTensors(a=f"{PREFIX}{name}.lora_A.weight", b=f"{PREFIX}{name}.lora_B.weight") for name in (Q, V)
    }


@pytest.mark.parametrize("suffix", ["lora_magnitude_vector", "lora_magnitude_vector.weight"])
def test_dora_magnitudes_are_found_under_both_names(suffix: str) -> None:
    magnitudes = {f"{PREFIX}{name}.{suffix}": (MODULES[name][0],) for name in (Q, V)}
    assert _map(LORA | magnitudes, use_dora=True)[Q].magnitude == f"{PREFIX}{Q}.{suffix}"


def test_adalora_ranks_may_differ_and_be_zero() -> None:
    config = parse_adapter_config(
        {
            "peft_type": "ADALORA", "init_r": 3, "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {f"{Q}.lora_E": [False] * 3, f"{V}.lora_E": [True, True, False]},
        }
    )  # fmt: skip
    shapes = {
        f"{PREFIX}{name}.{leaf}": shape
        for name, rank in ((Q, 0), (V, 2))
        for leaf, shape in (
            ("lora_A", (rank, 8)), ("lora_B", (MODULES[name][0], rank)), ("lora_E", (rank, 1)), ("ranknum", (1,)),
        )
    }  # fmt: skip
    mapped = map_tensors(config, _infos(shapes), MODULES)
    assert mapped[V].e == f"{PREFIX}{V}.lora_E"
    assert list(mapped) == sorted([Q, V])


def test_ia3_vectors_are_columns_or_for_feedforward_rows() -> None:
    config = parse_adapter_config(
        {"peft_type": "IA3", "target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    )
    mapped = map_tensors(config, _infos({f"{PREFIX}{Q}.ia3_l": (8, 1), f"{PREFIX}{DOWN}.ia3_l": (1, 16)}), MODULES)
    assert mapped[DOWN].ia3 == f"{PREFIX}{DOWN}.ia3_l"


VERA = {
    f"{PREFIX}{Q}.vera_lambda_d": (2,),
    f"{PREFIX}{Q}.vera_lambda_b": (8,),
    f"{PREFIX}{DOWN}.vera_lambda_d": (2,),
    f"{PREFIX}{DOWN}.vera_lambda_b": (8,),
}
SHARED = {"base_model.vera_A": (2, 16), "base_model.vera_B": (8, 2)}


@pytest.mark.parametrize("is_saved", [True, False])
def test_vera_projections_are_in_the_file_or_not_as_the_configuration_says(is_saved: bool) -> None:
    raw = {"peft_type": "VERA", "r": 2, "target_modules": ["q_proj", "down_proj"], "save_projection": is_saved}
    config = parse_adapter_config(raw)
    good, bad = (VERA | SHARED, VERA) if is_saved else (VERA, VERA | SHARED)
    assert map_tensors(config, _infos(good), MODULES)[Q].vera_d == f"{PREFIX}{Q}.vera_lambda_d"
    with pytest.raises(AdapterMismatchError, match=f"`save_projection` is {is_saved} but the file holds"):
        map_tensors(config, _infos(bad), MODULES)


def test_a_vera_projection_of_the_wrong_size_is_refused() -> None:
    config = parse_adapter_config({"peft_type": "VERA", "r": 2, "target_modules": ["q_proj", "down_proj"]})
    with pytest.raises(AdapterMismatchError) as caught:
        map_tensors(config, _infos(VERA | SHARED | {"base_model.vera_A": (2, 99)}), MODULES)
    assert caught.value.what == (
        "The shared 'base_model.vera_A' has the shape (2, 99); the targeted modules need (2, 16)."
    )


def _without(name: str) -> dict[str, tuple[int, ...]]:
    return {key: shape for key, shape in LORA.items() if name not in key}


@pytest.mark.parametrize(
    ("shapes", "changes", "message"),
    [
        ({}, {}, "The adapter file holds no lora tensor."),
        ({"nonsense": (1,)}, {}, "1 of 1 tensors belong to no module of this base that the configuration targets; "
                                 "the first is 'nonsense'."),
        (LORA | {f"{PREFIX}lm_head.lora_A.weight": (2, 8)}, {}, "first is 'base_model.model.lm_head.lora_A.weight'"),
        (LORA | {f"{Q}.lora_A.weight": (2, 8)}, {}, f"the first is '{Q}.lora_A.weight'"),
        (LORA | {f"{PREFIX}{Q}.lora_B.bias": (8,)}, {}, "lora_B.bias"),
        (LORA | {f"{PREFIX}{Q}.lora_magnitude_vector": (8,)}, {}, "lora_magnitude_vector"),
        (LORA | {f"{PREFIX}{DOWN}.lora_A.weight": (2, 16)}, {}, "1 of 5 tensors belong to no module"),
        (LORA, {"target_modules": ["q_proj"]}, "2 of 4 tensors belong to no module"),
        (LORA, {"target_modules": ["q_proj", "v_proj", "down_proj"]},
         f"1 modules that the configuration targets have no tensor; the first is '{DOWN}'."),
        (_without("v_proj.lora_B"), {}, f"Module '{V}' has {PREFIX}{V}.lora_A.weight but lacks lora_B.weight."),
        (LORA, {"use_dora": True}, "but lacks lora_magnitude_vector."),
        (LORA, {"r": 3}, f"Tensor '{PREFIX}{Q}.lora_A.weight' has the shape (2, 8); rank 3 on a module with 8 outputs "
                         "and 8 inputs needs (3, 8)."),
        (LORA, {"rank_pattern": {"v_proj": 4}}, "has the shape (2, 8); rank 4"),
        (LORA | {f"{PREFIX}{V}.lora_B.weight": (8, 2)}, {}, "needs (4, 2)."),
    ],
)  # fmt: skip
def test_a_partial_fit_is_refused_by_name(shapes: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterMismatchError) as caught:
        _map(shapes, **changes)
    assert message in caught.value.what
    assert caught.value.hint


def test_a_near_miss_gets_a_suggestion() -> None:
    with pytest.raises(AdapterMismatchError, match=f"Did you mean '{Q}'"):
        _map({f"{PREFIX}model.layer.0.self_attn.q_proj.lora_A.weight": (2, 8)})
