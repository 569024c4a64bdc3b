from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from adapterhub.base.identity import Base
from adapterhub.base.loading import load_model
from server.engine.runner import Runner
from tests.support.adapters import METHODS, open_with_peft, write_adapter
from tests.support.rows import Row, decode, expected_logits, prompt
from tests.support.tiny_models import build_base

# A mixed batch: every method, ranks 4 to 64, odd ranks, patterns, pruned ranks, two adapters of one task, two VeRA that
# share their projections and one that does not.
MIX: tuple[dict[str, Any], ...] = (
    {"method": "lora", "rank": 4},
    {"method": "lora", "rank": 4, "seed": 9},
    {"method": "lora", "rank": 64, "lora_alpha": 16},
    {"method": "lora", "rank": 7, "use_rslora": True},
    {"method": "lora", "rank": 8, "rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\.up_proj": 21}},
    {"method": "lora", "rank": 8, "alpha_pattern": {"v_proj": 40, "o_proj": 1}, "target_modules": ["v_proj", "o_proj"]},
    {"method": "lora", "rank": 5, "use_rslora": True, "rank_pattern": {"k_proj": 9}, "alpha_pattern": {"k_proj": 2}},
    {"method": "lora", "rank": 6, "layers_to_transform": [1], "layers_pattern": "layers"},
    {"method": "dora", "rank": 16},
    {"method": "dora", "rank": 5, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    {"method": "ia3"},
    {"method": "ia3", "target_modules": ["q_proj", "gate_proj"], "feedforward_modules": ["gate_proj"]},
    {"method": "adalora", "rank": 12},
    {"method": "adalora", "rank": 8, "pruned": True},
    {"method": "adalora", "rank": 2, "pruned": True, "seed": 3},
    {"method": "vera", "rank": 16},
    {"method": "vera", "rank": 16, "seed": 5, "target_modules": ["q_proj", "up_proj", "down_proj"]},
    {"method": "vera", "rank": 33, "projection_prng_key": 77, "save_projection": False},
)
BOUND = 1e-4


def write_all(folder: Path, base: Base, specs: Sequence[dict[str, Any]], **options: Any) -> list[Path]:
    return [write_adapter(folder / f"{idx}", base, as_view=True, **options, **spec) for idx, spec in enumerate(specs)]


def build_rows(num_adapters: int) -> list[Row]:
    """One row per adapter and two of the base; lengths, starting steps and prompt pieces differ."""
    return [
        Row(prompt(3 + (7 * idx) % 30, seed=idx), slot=slot, joins_at=idx % 3, pieces=1 + idx % 2)
        for idx, slot in enumerate([-1, *range(num_adapters), -1])
    ]


def assert_row_equals(row: Row, expected: Tensor, *, label: object, bound: float = BOUND) -> None:
    assert len(row.logits) == len(expected) > 2
    for found, wanted in zip(row.logits, expected, strict=True):
        assert (found - wanted).abs().max().item() < bound, label
        assert int(found.argmax()) == int(wanted.argmax()), label


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return build_base(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def views(base: Base, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_all(tmp_path_factory.mktemp("views"), base, MIX)


@pytest.mark.parametrize("kernel", ["cpu", "reference"])
def test_each_row_of_a_mixed_batch_equals_peft_with_that_adapter_alone(
    base: Base, views: list[Path], kernel: str
) -> None:
    runner = Runner(load_model(base), base, num_slots=len(views), num_blocks=240, block_size=4, kernel=kernel)
    for slot, view in enumerate(views):
        runner.write_slot(slot, runner.load_adapter(view))
    rows = build_rows(len(views))
    decode(runner, rows, num_steps=8)
    for row in rows:
        model = load_model(base)
        peft_model = model if row.slot < 0 else open_with_peft(model, views[row.slot])
        expected = expected_logits(peft_model, row)
        assert_row_equals(row, expected, label="base" if row.slot < 0 else MIX[row.slot])


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_alone_equals_peft_on_the_quantized_base(method: str, tmp_path: Path) -> None:
    base = build_base(
        tmp_path / "base", "qwen2", quantization="nf4"
    )  # It has biases, which the methods treat differently.
    view = write_adapter(tmp_path / "view", base, method=method, rank=11, as_view=True)
    runner = Runner(load_model(base), base, num_slots=1, num_blocks=16)
    runner.write_slot(0, runner.load_adapter(view))
    row = Row(prompt(20, seed=1), slot=0)
    decode(runner, [row], num_steps=5)
    assert_row_equals(row, expected_logits(open_with_peft(load_model(base), view), row), label=method)


@pytest.mark.real_base
def test_each_row_of_a_mixed_batch_equals_peft_on_the_embedded_base(real_base: Base, tmp_path: Path) -> None:
    specs = [
        {"method": "lora", "rank": 16},
        {"method": "lora", "rank": 7, "use_rslora": True, "rank_pattern": {"q_proj": 3}},
        {"method": "dora", "rank": 8},
        {"method": "ia3"},
        {"method": "adalora", "rank": 8, "pruned": True},
        {"method": "vera", "rank": 64, "target_modules": ["q_proj", "v_proj"]},
    ]
    plain = load_model(real_base)
    views = write_all(tmp_path, real_base, specs, plain=plain, strength=0.2)
    runner = Runner(copy.deepcopy(plain), real_base, num_slots=len(views), num_blocks=64)
    for slot, view in enumerate(views):
        runner.write_slot(slot, runner.load_adapter(view))
    rows = [Row(prompt(12, seed=1), slot=slot, joins_at=slot % 2) for slot in range(-1, len(views))]
    decode(runner, rows, num_steps=4)
    first_of_base = rows[0].logits[0]
    for row in rows:
        model = plain if row.slot < 0 else open_with_peft(plain, views[row.slot])
        expected = expected_logits(model, row)
        # Logits reach 40, and float32 transformers is itself up to 1e-4 from float64 here: the bound is relative.
        bound = 1e-5 * expected.abs().max().item()
        assert_row_equals(row, expected, label=row.slot, bound=bound)
        if row.slot >= 0:
            assert (expected[0] - first_of_base).abs().max().item() > 100 * bound, specs[row.slot]
            model.unload()
