from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapterhub.base.identity import Base
from adapterhub.base.loading import load_model
from adapterhub.errors import (
    AdapterConfigError,
    AdapterHubError,
    AdapterLoadError,
    AdapterMismatchError,
    AdapterWeightsError,
    BaseMismatchError,
)
from server.engine.loader import LoadedAdapter, load_adapter
from server.layers import serving_weight
from tests.support.adapters import METHODS, write_adapter
from tests.support.tiny_models import build_base

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return build_base(tmp_path_factory.mktemp("base"), "qwen2")


@pytest.fixture(scope="module")
def model(base: Base) -> torch.nn.Module:
    return load_model(base)


def change_tensors(view: Path, change: Callable[[str, Tensor], Tensor]) -> None:
    save_file({name: change(name, tensor) for name, tensor in load_file(view / WEIGHTS).items()}, view / WEIGHTS)


def change_config(view: Path, **keys: object) -> None:
    path = view / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def refusal(kind: type[AdapterHubError], view: Path, base: Base, model: torch.nn.Module) -> str:
    with pytest.raises(kind) as caught:
        load_adapter(view, base, model)
    assert type(caught.value) is kind
    return str(caught.value)


def test_an_adapter_of_another_base_is_refused(base: Base, model: torch.nn.Module, tmp_path: Path) -> None:
    view = write_adapter(tmp_path / "summarize", base, method="lora", as_view=True)
    (view / "adapterhub.json").write_text(json.dumps({"base_digest": "0" * 64}))
    assert refusal(BaseMismatchError, view, base, model) == (
        f"The adapter in 'summarize' was made for the base with digest '{'0' * 64}'; this server runs 'tiny-qwen2' "
        f"(none) with digest '{base.digest}'. Serve the base it was trained on, or train it again on this one."
    )


@pytest.mark.parametrize("missing", ["adapterhub.json", "adapter_config.json", WEIGHTS])
def test_a_view_without_one_of_its_files_is_refused(
    missing: str, base: Base, model: torch.nn.Module, tmp_path: Path
) -> None:
    view = write_adapter(tmp_path / "view", base, method="lora", as_view=True)
    (view / missing).unlink()
    message = refusal(AdapterLoadError, view, base, model)
    assert message.startswith(f"Cannot read '{missing}' in 'view': ")
    assert "`hub adapters verify`" in message


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_by_name(
    bad: float, base: Base, model: torch.nn.Module, tmp_path: Path
) -> None:
    view = write_adapter(tmp_path / "view", base, method="lora", as_view=True)
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"

    def spoil(key: str, tensor: Tensor) -> Tensor:
        if key == name:
            tensor[3, 2] = bad
        return tensor

    change_tensors(view, spoil)
    assert refusal(AdapterWeightsError, view, base, model) == (
        f"In tensor '{name}', 1 of 256 values are NaN or infinite. "
        "The training run diverged; lower the learning rate and train again."
    )


def test_a_dora_direction_of_length_zero_is_refused(base: Base, tmp_path: Path) -> None:
    view = write_adapter(tmp_path / "view", base, method="dora", as_view=True)
    model = load_model(base)
    module = "model.layers.0.self_attn.k_proj"
    model.get_submodule(module).weight.data[0] = 0
    change_tensors(
        view, lambda key, tensor: tensor * (torch.arange(len(tensor)) > 0)[:, None] if "lora_B" in key else tensor
    )
    assert refusal(AdapterWeightsError, view, base, model).startswith(f"In what '{module}' adds to the base, ")


@pytest.mark.parametrize("method", METHODS)
def test_an_untrained_adapter_is_refused_because_it_does_nothing(
    method: str, base: Base, model: torch.nn.Module, tmp_path: Path
) -> None:
    view = write_adapter(tmp_path / "view", base, method=method, strength=0.0, as_view=True)

    def untrained(key: str, tensor: Tensor) -> Tensor:
        return torch.ones_like(tensor) if "ia3_l" in key else tensor

    change_tensors(view, untrained)
    message = refusal(AdapterLoadError, view, base, model)
    assert message.startswith(f"The {method} adapter in 'view' changes nothing in its ")
    assert "model.layers.0." in message
    assert message.endswith("Its weights are those of an untrained adapter; train it, or use the base.")


def test_an_adalora_whose_ranks_were_all_pruned_is_refused(base: Base, model: torch.nn.Module, tmp_path: Path) -> None:
    view = write_adapter(tmp_path / "view", base, method="adalora", rank=2, as_view=True)
    tensors = load_file(view / WEIGHTS)
    change_tensors(view, lambda key, tensor: tensor[:, :0].contiguous() if "lora_B" in key else tensor[:0])
    masks = {key.removeprefix("base_model.model."): [False, False] for key in tensors if "lora_E" in key}
    change_config(view, rank_pattern=masks)
    assert "(every one was pruned away)" in refusal(AdapterLoadError, view, base, model)


def test_configurations_and_tensors_that_fit_only_in_part_are_refused(
    base: Base, model: torch.nn.Module, tmp_path: Path
) -> None:
    unknown = write_adapter(tmp_path / "unknown", base, method="lora", as_view=True)
    change_config(unknown, brand_new_option=True)
    assert "'brand_new_option'" in refusal(AdapterConfigError, unknown, base, model)
    partial = write_adapter(tmp_path / "partial", base, method="lora", as_view=True)
    change_config(partial, target_modules=["q_proj"])
    assert "belong to no module" in refusal(AdapterMismatchError, partial, base, model)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_dora_norm_equals_the_norm_of_the_dense_sum(quantization, tmp_path: Path) -> None:
    base = build_base(tmp_path / "base", "qwen2", quantization=quantization)
    model = load_model(base, keep_quantized=quantization == "nf4")
    view = write_adapter(tmp_path / "view", base, method="dora", rank=5, lora_alpha=7, as_view=True)
    loaded = load_adapter(view, base, model)
    tensors = load_file(view / WEIGHTS)
    for module, weights in loaded.modules.items():
        a, b, magnitude = (
            tensors[f"base_model.model.{module}.{part}"].double()
            for part in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
        )
        dense = serving_weight(model.get_submodule(module)).double() + 7 / 5 * b @ a
        assert weights.out_scale is not None
        torch.testing.assert_close(weights.out_scale.double(), magnitude / dense.norm(dim=1), rtol=1e-6, atol=0)


def load_vera(folder: Path, base: Base, model: torch.nn.Module, **options) -> LoadedAdapter:
    return load_adapter(write_adapter(folder, base, method="vera", as_view=True, **options), base, model)


def test_vera_adapters_of_one_key_share_one_resident_copy(base: Base, model: torch.nn.Module, tmp_path: Path) -> None:
    saved = load_vera(tmp_path / "saved", base, model, seed=1)
    drawn = load_vera(tmp_path / "drawn", base, model, seed=2, save_projection=False)
    other_key = load_vera(tmp_path / "key", base, model, projection_prng_key=5)
    other_rank = load_vera(tmp_path / "rank", base, model, rank=9)
    name = "model.layers.0.self_attn.q_proj"
    assert saved.modules[name].a is drawn.modules[name].a
    assert saved.modules[name].b is drawn.modules["model.layers.1.self_attn.q_proj"].b
    assert saved.modules[name].a is not other_key.modules[name].a
    assert saved.modules[name].a is not other_rank.modules[name].a
    assert saved.size_bytes == sum(4 * (8 + num_out) for num_out, _ in base.modules.values())


def test_vera_projections_that_differ_from_their_key_stay_with_their_adapter(
    base: Base, model: torch.nn.Module, tmp_path: Path
) -> None:
    usual = load_vera(tmp_path / "usual", base, model)
    view = write_adapter(tmp_path / "own", base, method="vera", as_view=True)
    change_tensors(view, lambda key, tensor: tensor * 2 if key == "base_model.vera_A" else tensor)
    own = load_adapter(view, base, model)
    name = "model.layers.0.mlp.down_proj"
    first, second = usual.modules[name].a, own.modules[name].a
    assert first is not None
    assert second is not None
    assert torch.equal(second, first * 2)


def test_half_precision_files_are_widened(base: Base, model: torch.nn.Module, tmp_path: Path) -> None:
    view = write_adapter(tmp_path, base, method="lora", as_view=True)
    change_tensors(view, lambda _, tensor: tensor.to(torch.bfloat16))
    loaded = load_adapter(view, base, model)
    assert {tensor.dtype for weights in loaded.modules.values() for tensor in weights.tensors()} == {torch.float32}
