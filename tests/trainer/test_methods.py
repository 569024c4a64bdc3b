from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from adapterhub.base import Base
from adapterhub.base.loading import load_model, load_tokenizer
from adapterhub.errors import RecipeError, TrainingError
from adapterhub.recipes import Recipe
from tests.support.adapters import METHODS, open_with_peft
from tests.support.tiny_models import build_base
from tests.support.training import echo_rows, tiny_recipe
from trainer.data.tokens import TokenRow
from trainer.loop import TrainingResult, held_out_loss, train
from trainer.methods.configs import build_peft_config
from trainer.methods.guards import check_all_moved, keep_float32_, snapshot, stop_repacking_
from trainer.progress import StepReport
from trainer.run import save_adapter

NUM_HELD_OUT = 16
PATHS = [pytest.param(False, id="plain-copy"), pytest.param(True, id="4-bit-layers")]


@dataclass(frozen=True)
class Ground:
    base: Base
    tokenizer: PreTrainedTokenizerBase
    train: list[TokenRow]
    held_out: list[TokenRow]


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    base = build_base(tmp_path_factory.mktemp("base"), quantization="nf4")
    tokenizer = load_tokenizer(base)
    rows = echo_rows(tokenizer)
    return Ground(base, tokenizer, rows[NUM_HELD_OUT:], rows[:NUM_HELD_OUT])


def load(ground: Ground, *, keep_quantized: bool = False) -> Any:
    model = load_model(ground.base, keep_quantized=keep_quantized)
    stop_repacking_(model)
    return model


def run(
    ground: Ground, recipe: Recipe, folder: Path, *, keep_quantized: bool = False, **options: Any
) -> TrainingResult:
    return train(
        load(ground, keep_quantized=keep_quantized),
        ground.train,
        recipe=recipe,
        base=ground.base,
        tokenizer=ground.tokenizer,
        run_folder=folder,
        **options,
    )


@torch.no_grad()
def logits(model: Any, row: TokenRow) -> torch.Tensor:
    return model(input_ids=torch.tensor([row.input_ids])).logits


@pytest.mark.parametrize("keep_quantized", PATHS)
@pytest.mark.parametrize("method", METHODS)
def test_every_tensor_moves_the_held_out_loss_falls_and_peft_loads_the_same_model(
    ground: Ground, tmp_path: Path, method: str, keep_quantized: bool
) -> None:
    before = held_out_loss(load(ground, keep_quantized=keep_quantized), ground.held_out, pad_token_id=0)
    result = run(ground, tiny_recipe(method), tmp_path, keep_quantized=keep_quantized)
    assert {p.dtype for p in result.model.parameters() if p.requires_grad} == {torch.float32}
    assert held_out_loss(result.model, ground.held_out, pad_token_id=0) < before - 0.05

    folder = save_adapter(result.model, tmp_path / "adapter", base=ground.base)
    names = {"adapter_config.json", "adapter_model.safetensors", "adapterhub.json"}
    assert {path.name for path in folder.iterdir()} == names
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == ground.base.name
    reopened = open_with_peft(load(ground, keep_quantized=keep_quantized), folder)
    for row in ground.held_out[:3]:
        torch.testing.assert_close(logits(reopened, row), logits(result.model, row), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_training_on_4_bit_layers_and_on_their_plain_copy_gives_the_same_losses(
    ground: Ground, tmp_path: Path, method: str
) -> None:
    recipe = tiny_recipe(method, training__max_steps=6)
    curves = [[p.loss for p in run(ground, recipe, tmp_path, keep_quantized=keep).metrics] for keep in (False, True)]
    assert curves[0] == pytest.approx(curves[1], abs=5e-3)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(
    ground: Ground, tmp_path: Path, method: str
) -> None:
    def tensors(seed: int) -> dict[str, torch.Tensor]:
        dropout = {} if method == "ia3" else {"training__dropout": 0.1}
        recipe = tiny_recipe(method, training__max_steps=5, training__seed=seed, **dropout)
        torch.manual_seed(torch.seed() % 1000)  # What ran before must not matter.
        model = run(ground, recipe, tmp_path).model
        return load_file(save_adapter(model, tmp_path / f"{seed}", base=ground.base) / "adapter_model.safetensors")

    first, again, other = tensors(1), tensors(1), tensors(2)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first if first[name].shape == other[name].shape)


def test_adalora_cuts_ranks_to_the_budget_and_keeps_its_factors_near_orthogonal(ground: Ground, tmp_path: Path) -> None:
    result = run(ground, tiny_recipe("adalora", training__rank=4), tmp_path)
    config = result.model.peft_config["default"]
    kept = [sum(pattern) for pattern in config.rank_pattern.values()]
    assert config.init_r == 6
    assert sum(kept) <= 4 * len(kept) < 6 * len(kept)
    folder = save_adapter(result.model, tmp_path / "adapter", base=ground.base)
    saved = load_file(folder / "adapter_model.safetensors")
    assert sorted(t.shape[0] for name, t in saved.items() if name.endswith("lora_E")) == sorted(kept)


def test_the_orthogonality_term_of_adalora_counts(ground: Ground, tmp_path: Path) -> None:
    def drift(weight: float) -> float:
        config = build_peft_config(tiny_recipe("adalora", training__max_steps=8), ground.base)
        config.orth_reg_weight = weight
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("trainer.loop.build_peft_config", lambda *_: config)
            result = run(ground, tiny_recipe("adalora", training__max_steps=8), tmp_path)
        a = next(p for name, p in result.model.named_parameters() if "lora_A" in name)
        return (a @ a.T - torch.eye(a.shape[0])).norm().item()

    assert drift(10.0) < drift(0.0)


def test_the_reported_loss_of_adalora_is_that_of_the_tokens_alone(ground: Ground, tmp_path: Path) -> None:
    # Before the first step every adapter is "no change", so all methods see the loss of the base on the same batch.
    first = [run(ground, tiny_recipe(m, training__max_steps=5), tmp_path).metrics[0].loss for m in ("lora", "adalora")]
    assert first[0] == pytest.approx(first[1], abs=1e-5)


def test_adalora_refuses_a_run_too_short_to_cut_ranks(ground: Ground) -> None:
    with pytest.raises(RecipeError, match=r"AdaLoRA cannot cut ranks within training\.max_steps = 3\. Use at least 5"):
        build_peft_config(tiny_recipe("adalora", training__max_steps=3), ground.base)


def test_every_linear_is_adapted_by_default_and_named_targets_are_checked(ground: Ground) -> None:
    leaves = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert sorted(build_peft_config(tiny_recipe("lora"), ground.base).target_modules) == leaves
    assert build_peft_config(tiny_recipe("ia3"), ground.base).feedforward_modules == {"down_proj"}
    narrow = tiny_recipe("vera", training__target_modules=["q_proj"])
    assert build_peft_config(narrow, ground.base).target_modules == {"q_proj"}
    with pytest.raises(RecipeError) as caught:
        build_peft_config(tiny_recipe(training__target_modules=["q_prj"]), ground.base)
    message = "training.target_modules names 'q_prj', which base 'tiny-llama' lacks. Did you mean 'q_proj'?"
    assert str(caught.value) == message


def test_a_tensor_that_did_not_move_stops_the_run_by_name() -> None:
    model = torch.nn.Linear(2, 2)
    before = snapshot(model)
    with torch.no_grad():
        model.weight.add_(1)
    with pytest.raises(TrainingError, match=r"1 of 2 trainable tensors did not move: bias\. Check `training"):
        check_all_moved(model, before, pruned=frozenset())
    check_all_moved(model, before, pruned=frozenset({"bias"}))


def test_a_tensor_with_nan_stops_the_run_by_name() -> None:
    model = torch.nn.Linear(2, 2)
    before = snapshot(model)
    with torch.no_grad():
        model.weight.fill_(float("nan"))
        model.bias.add_(1)
    with pytest.raises(TrainingError, match=r"1 of 2 trained tensors hold NaN or infinity: weight\. Lower"):
        check_all_moved(model, before, pruned=frozenset())


def test_a_step_too_small_to_change_bfloat16_changes_float32() -> None:
    model = torch.nn.Linear(2, 1, bias=False, dtype=torch.bfloat16)
    torch.nn.init.ones_(model.weight)
    assert keep_float32_(model) == 2
    before = snapshot(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    check_all_moved(model, before, pruned=frozenset())
    assert torch.equal(model.weight.bfloat16().float(), before["weight"])


def test_a_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"no trainable parameter\. Check `training\.target_modules`"):
        keep_float32_(torch.nn.Linear(2, 2).requires_grad_(False))


def test_weights_that_an_evaluation_has_repacked_are_refused(ground: Ground) -> None:
    model = load_model(ground.base, keep_quantized=True)
    stop_repacking_(model)
    assert not any(getattr(module, "support_avx512bf16_for_cpu", False) for module in model.modules())
    layer: Any = model.get_submodule("model.layers.0.mlp.up_proj")
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(TrainingError, match=r"weights of model\.layers\.0\.mlp\.up_proj were repacked"):
        stop_repacking_(model)


def test_a_diverging_run_stops_at_the_step(ground: Ground, tmp_path: Path) -> None:
    recipe = tiny_recipe(training__learning_rate=1e30, training__max_grad_norm=1e30, training__warmup=0)
    with pytest.raises(TrainingError, match=r"The loss is (nan|inf) at step \d+\. Lower `training\.learning_rate`"):
        run(ground, recipe, tmp_path)


def test_each_step_is_reported_with_loss_and_rate(ground: Ground, tmp_path: Path) -> None:
    reports: list[StepReport] = []
    result = run(ground, tiny_recipe(training__max_steps=4), tmp_path, on_step=reports.append)
    assert [(r.step, r.num_steps) for r in reports] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert all(r.loss > 0 and r.tokens_per_s > 0 for r in reports)
    assert [p.loss for p in result.metrics] == [r.loss for r in reports]
    assert 0 < result.num_train_tokens <= 4 * 8 * max(len(row.input_ids) for row in ground.train)
