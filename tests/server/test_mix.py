"""A stack of adapters against PEFT: float64 sums of its deltas, and its own `add_weighted_adapter`."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adapterhub.base.identity import Base
from adapterhub.base.loading import load_model
from adapterhub.errors import AdapterLoadError
from server.engine.loader import LoadedAdapter, load_adapter
from server.engine.mix import load_experts, load_mix
from server.engine.runner import Runner
from server.engine.types import AdapterHandle, AdapterPart
from server.kernels import Member, Segments, SlotWeights, pick_kernel
from tests.support.adapters import open_with_peft, write_adapter
from tests.support.rows import Row, decode, expected_logits, prompt
from tests.support.tiny_models import build_base

# Every kind that has a sum: ranks of all sizes, own scales, cut ranks, shared projections, modules of some only.
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "rank": 4},
    "wide": {"method": "lora", "rank": 21, "lora_alpha": 5, "seed": 1},
    "rslora": {"method": "lora", "rank": 7, "use_rslora": True, "seed": 2},
    "queries": {"method": "lora", "rank": 3, "target_modules": ["q_proj"], "seed": 3},
    "adalora": {"method": "adalora", "rank": 9, "seed": 4},
    "pruned": {"method": "adalora", "rank": 3, "pruned": True, "seed": 5},
    "vera": {"method": "vera", "rank": 16, "seed": 6},
    "vera_mlp": {"method": "vera", "rank": 16, "target_modules": ["up_proj", "down_proj"], "seed": 7},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return build_base(tmp_path_factory.mktemp("base"), "qwen2")


@pytest.fixture(scope="module")
def model(base: Base) -> torch.nn.Module:
    return load_model(base)


@pytest.fixture(scope="module")
def views(base: Base, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("views")
    kinds: dict[str, dict[str, Any]] = KINDS | {"dora": {"method": "dora"}, "ia3": {"method": "ia3"}}
    return {name: write_adapter(folder / name, base, as_view=True, **spec) for name, spec in kinds.items()}


def served(weights: SlotWeights) -> Tensor:
    """What a slot adds to the weight of its linear, (O, H) float64."""
    assert weights.a is not None
    assert weights.b is not None
    assert weights.in_scale is weights.out_scale is weights.out_shift is None
    a, b = weights.a.double(), weights.b.double()
    if weights.rank_scale is not None:
        b = b * weights.rank_scale.double()
    return (b if weights.delta_scale is None else b * weights.delta_scale.double()[:, None]) @ a


def peft_deltas(base: Base, view: Path) -> dict[str, Tensor]:
    """What PEFT adds to each linear, (O, H) float64, computed by PEFT in float64."""
    peft = open_with_peft(load_model(base), view).double()
    return {
        name.removeprefix("base_model.model."): layer.get_delta_weight("default").detach()
        for name, layer in peft.named_modules()
        if hasattr(layer, "get_delta_weight") and getattr(layer, "r", None)
    }


def summed(deltas: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for weight, members in zip(weights, deltas, strict=True):
        for name, delta in members.items():
            total[name] = total.get(name, torch.zeros_like(delta)) + weight * delta
    return total


@pytest.mark.parametrize("names", [*itertools.combinations(KINDS, 2), tuple(KINDS)], ids="+".join)
def test_a_mix_is_the_weighted_sum_of_what_peft_adds(
    names: tuple[str, ...], base: Base, model: torch.nn.Module, views: dict[str, Path], peft_sums: dict[str, Any]
) -> None:
    weights = [(-1) ** idx * (0.3 + 0.45 * idx) for idx in range(len(names))]
    mix = load_mix([(views[name], weight) for name, weight in zip(names, weights, strict=True)], base, model)
    expected = summed([peft_sums[name] for name in names], weights)
    assert {name for name, delta in expected.items() if delta.any()} == set(mix.modules)
    for module, slot in mix.modules.items():
        bound = 1e-6 * expected[module].abs().max().item()
        torch.testing.assert_close(served(slot), expected[module], rtol=0, atol=bound)


@pytest.fixture(scope="module")
def peft_sums(base: Base, views: dict[str, Path]) -> dict[str, dict[str, Tensor]]:
    return {name: peft_deltas(base, views[name]) for name in KINDS}


def test_the_rank_of_a_mix_is_the_sum_of_the_ranks_its_modules_have(
    base: Base, model: torch.nn.Module, views: dict[str, Path]
) -> None:
    mix = load_mix([(views[name], 0.5) for name in ("lora", "queries", "wide")], base, model)
    ranks = {name: weights.a.shape[0] for name, weights in mix.modules.items() if weights.a is not None}
    assert {rank for name, rank in ranks.items() if name.endswith("q_proj")} == {4 + 3 + 21}
    assert {rank for name, rank in ranks.items() if not name.endswith("q_proj")} == {4 + 21}


def test_one_adapter_of_weight_one_is_loaded_as_it_is(
    base: Base, model: torch.nn.Module, views: dict[str, Path]
) -> None:
    for name in views:
        alone, mix = load_adapter(views[name], base, model), load_mix([(views[name], 1.0)], base, model)
        for module, weights in alone.modules.items():
            for expected, found in zip(weights.tensors(), mix.modules[module].tensors(), strict=True):
                assert torch.equal(expected, found)


@pytest.mark.parametrize("ranks", [(8, 8), (5, 16)])
@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, -0.5)])
def test_rows_of_a_mix_equal_the_adapter_peft_concatenates(
    ranks: tuple[int, int], weights: tuple[float, float], base: Base, tmp_path: Path
) -> None:
    paths = [
        write_adapter(tmp_path / f"{idx}", base, method="lora", rank=rank, seed=idx, as_view=True)
        for idx, rank in enumerate(ranks)
    ]
    plain = load_model(base)
    runner = Runner(copy.deepcopy(plain), base, num_slots=3, num_blocks=24)
    runner.write_slot(0, runner.load_mix(list(zip(paths, weights, strict=True))))
    runner.write_slot(1, runner.load_adapter(paths[0]))
    rows = [Row(prompt(9, seed=slot), slot=slot, joins_at=slot % 2) for slot in (0, 1, -1)]
    decode(runner, rows, num_steps=5)
    peft: Any = open_with_peft(plain, paths[0])
    peft.load_adapter(paths[1], "other")
    peft.base_model.add_weighted_adapter(["default", "other"], list(weights), "mix", combination_type="cat")
    peft.set_adapter("mix")
    expected = expected_logits(peft, rows[0])
    for found, wanted in zip(rows[0].logits, expected, strict=True):
        assert (found - wanted).abs().max().item() < 1e-4


@pytest.mark.parametrize("name", ["dora", "ia3"])
@pytest.mark.parametrize("verb", ["mixed", "gated"])
def test_methods_without_a_sum_are_refused_by_name(
    name: str, verb: str, base: Base, model: torch.nn.Module, views: dict[str, Path]
) -> None:
    def combine() -> LoadedAdapter:
        pair = [views["lora"], views[name]]
        return load_experts(pair, base, model) if verb == "gated" else load_mix([(v, 0.5) for v in pair], base, model)

    with pytest.raises(AdapterLoadError) as caught:
        combine()
    assert str(caught.value) == (
        f"The {name} adapter in {name!r} cannot be {verb}: it scales what the base computes, so no weighted sum "
        "with it is defined. Use it alone with weight 1, or train the task with lora, adalora or vera."
    )


def test_more_ranks_than_a_slot_serves_are_refused(base: Base, model: torch.nn.Module, tmp_path: Path) -> None:
    wide = write_adapter(tmp_path / "wide", base, method="lora", rank=513, target_modules=["v_proj"], as_view=True)
    with pytest.raises(AdapterLoadError) as caught:
        load_mix([(wide, 0.5), (wide, 0.25)], base, model)
    assert str(caught.value) == (
        "Stacked in 'model.layers.0.self_attn.v_proj', the members have rank 1026 (513 + 513); the limit is 1024. "
        "Combine fewer adapters, or adapters of lower rank."
    )


@pytest.mark.parametrize("kernel", ["reference", "cpu"])
def test_experts_are_weighed_per_token_by_their_column_of_the_gates(
    kernel: str, base: Base, model: torch.nn.Module, views: dict[str, Path], peft_sums: dict[str, Any]
) -> None:
    names = ("lora", "queries", "adalora", "vera")
    experts = load_experts([views[name] for name in names], base, model)
    generator = torch.Generator().manual_seed(0)
    for module, slot in experts.modules.items():
        num_out, num_in = base.modules[module]
        x = torch.randn(5, num_in, generator=generator)
        gates = torch.randn(5, len(names), generator=generator)
        y = torch.zeros(5, num_out)
        segments = Segments((0,), (5,))
        pick_kernel(kernel, device="cpu").apply_deltas_(
            y, x, segments=segments, members=[Member(0, num_out, [slot])], gates=gates
        )
        expected = sum(
            gates[:, [idx]].double() * (x.double() @ peft_sums[name][module].T)
            for idx, name in enumerate(names)
            if module in peft_sums[name]
        )
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


def part(digest: str, weight: float) -> AdapterPart:
    return AdapterPart(digest * 64, f"task-{digest}@v1", weight, Path)


def test_the_digest_of_a_mix_covers_members_and_weights_and_nothing_else() -> None:
    first = AdapterHandle.mixed([part("a", 0.7), part("b", -0.3)])
    assert first.label == "mix(task-a@v1:0.7,task-b@v1:-0.3)"
    assert AdapterHandle.mixed([part("b", -0.3), part("a", 0.7)]) == first
    others = [[part("a", 0.7), part("b", 0.3)], [part("a", -0.3), part("b", 0.7)], [part("a", 0.7)], [part("a", 1)]]
    digests = {first.digest, *(AdapterHandle.mixed(other).digest for other in others)}
    assert len(digests) == 5
    assert AdapterHandle.mixed([part("a", 1.0)]).digest == "a" * 64
