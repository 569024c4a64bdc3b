from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adapterhub.base.identity import Base
from adapterhub.base.loading import load_model
from adapterhub.errors import BaseMismatchError, EngineStateError
from server.engine.runner import Runner, StepRow
from server.layers import AdapterLinear
from tests.support.adapters import METHODS, write_adapter
from tests.support.rows import Row, decode, prompt
from tests.support.tiny_models import build_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return build_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def runner(base: Base) -> Runner:
    return Runner(load_model(base), base, num_slots=3, num_blocks=16, block_size=4)


def one_row(slot: int, *, num_tokens: int = 9, first_block: int = 0) -> StepRow:
    return StepRow(tuple(prompt(num_tokens, seed=1)), 0, tuple(range(first_block, first_block + 4)), slot)


def test_every_slot_write_raises_the_epoch_and_a_stale_step_is_refused(
    runner: Runner, base: Base, tmp_path: Path
) -> None:
    adapter = runner.load_adapter(write_adapter(tmp_path, base, method="lora", as_view=True))
    planned = runner.epoch
    assert runner.write_slot(1, adapter) == planned + 1
    with pytest.raises(EngineStateError) as caught:
        runner.step([one_row(-1)], epoch=planned)
    assert str(caught.value) == (
        "The step was planned for slot epoch 0, but the slots are at epoch 1. Plan the step again with `Runner.epoch`."
    )
    assert runner.clear_slot(1) == planned + 2
    assert runner.epoch == planned + 2


@pytest.mark.parametrize("first", METHODS)
def test_a_reused_slot_keeps_nothing_of_its_last_adapter(
    first: str, runner: Runner, base: Base, tmp_path: Path
) -> None:
    small = write_adapter(tmp_path / "small", base, method="lora", rank=2, target_modules=["v_proj"], as_view=True)
    large = write_adapter(tmp_path / "large", base, method=first, rank=16, as_view=True)
    runner.write_slot(0, runner.load_adapter(small))
    fresh = runner.step([one_row(0)], epoch=runner.epoch)
    runner.write_slot(0, runner.load_adapter(large))
    between = runner.step([one_row(0)], epoch=runner.epoch)
    runner.write_slot(0, runner.load_adapter(small))
    assert torch.equal(runner.step([one_row(0)], epoch=runner.epoch), fresh)
    assert not torch.allclose(between, fresh, atol=1e-2)
    runner.clear_slot(0)
    layers = [module for module in runner.model.modules() if isinstance(module, AdapterLinear)]
    assert len(layers) == len(base.modules)
    assert all(layer.slots == (None, None, None) for layer in layers)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (one_row(0), "A row uses slot 0, which holds no adapter. Write the slot first; -1 is the base."),
        (one_row(3), "A row uses slot 3, which holds no adapter. Write the slot first; -1 is the base."),
        (one_row(-2), "A row uses slot -2, which holds no adapter. Write the slot first; -1 is the base."),
        (
            StepRow((), 3, (0,), -1),
            "A row with 0 tokens from position 3 has 1 blocks. It needs at least one token and 1 blocks of 4 tokens.",
        ),
        (
            StepRow((5,), 8, (0, 1), -1),
            "A row with 1 tokens from position 8 has 2 blocks. It needs at least one token and 3 blocks of 4 tokens.",
        ),
        (StepRow((5,), 0, (16,), -1), "A row uses blocks (16,). Blocks are 0 to 15."),
        (StepRow((5,), 0, (-1,), -1), "A row uses blocks (-1,). Blocks are 0 to 15."),
        (
            StepRow((5, 6), 0, (0,), -1, torch.ones(1, 2, 3)),
            "A row with 2 tokens has gates of shape (1, 2, 3). Gates are (tokens, 2 layers, experts).",
        ),
    ],
)
def test_rows_that_do_not_fit_are_refused(row: StepRow, message: str, runner: Runner) -> None:
    with pytest.raises(EngineStateError) as caught:
        runner.step([one_row(-1), row], epoch=runner.epoch)
    assert str(caught.value) == message


def test_slots_that_do_not_exist_are_refused(runner: Runner, base: Base, tmp_path: Path) -> None:
    adapter = runner.load_adapter(write_adapter(tmp_path, base, method="ia3", as_view=True))
    for write in (lambda: runner.write_slot(3, adapter), lambda: runner.clear_slot(-1)):
        with pytest.raises(EngineStateError, match=r"There is no slot (3|-1)\. Slots are 0 to 2\."):
            write()


def test_an_adapter_loaded_for_another_base_is_refused(runner: Runner, tmp_path: Path) -> None:
    other = build_base(tmp_path / "other", seed=1)
    adapter = Runner(load_model(other), other, num_slots=1, num_blocks=1).load_adapter(
        write_adapter(tmp_path / "view", other, method="lora", as_view=True)
    )
    with pytest.raises(BaseMismatchError, match=r"this runner serves .*\. Load it again for this base\."):
        runner.write_slot(0, adapter)


def test_no_rows_give_no_logits(runner: Runner) -> None:
    assert runner.step([], epoch=runner.epoch).shape[0] == 0


def test_the_order_of_rows_changes_nothing_but_the_order_of_answers(runner: Runner, base: Base, tmp_path: Path) -> None:
    for slot, method in enumerate(("lora", "ia3", "vera")):
        runner.write_slot(
            slot, runner.load_adapter(write_adapter(tmp_path / method, base, method=method, as_view=True))
        )
    rows = [one_row(slot, num_tokens=3 + slot, first_block=4 * (slot + 1)) for slot in (-1, 0, 1, 2)]
    straight = runner.step(rows, epoch=runner.epoch)
    turned = runner.step(rows[::-1], epoch=runner.epoch)
    assert torch.equal(straight, turned.flip(0))


def test_a_row_is_not_spoiled_by_a_neighbour_or_an_earlier_owner_of_its_blocks(runner: Runner) -> None:
    """Keys and values of one row become NaN; other rows, and later rows in the same blocks, stay as they were."""
    clean = runner.step([one_row(-1, num_tokens=5, first_block=8)], epoch=runner.epoch)
    embedding = runner.model.get_input_embeddings()
    poison = 255
    kept = embedding.weight.data[poison].clone()
    embedding.weight.data[poison] = float("nan")
    broken = StepRow((poison,) * 14, 0, (0, 1, 2, 3), -1)
    logits = runner.step([broken, one_row(-1, num_tokens=5, first_block=8)], epoch=runner.epoch)
    assert logits[0].isnan().all()
    assert torch.allclose(logits[1], clean[0], atol=1e-5)
    token = int(clean.argmax())
    decode_rows = [StepRow((poison,), 14, (0, 1, 2, 3), -1), StepRow((token,), 5, (8, 9), -1)]
    logits = runner.step(decode_rows, epoch=runner.epoch)
    assert logits[0].isnan().all()
    assert logits[1].isfinite().all()
    heir = runner.step([one_row(-1, num_tokens=5)], epoch=runner.epoch)  # Blocks 0 to 3 again.
    heir_next = runner.step([StepRow((token,), 5, (0, 1, 2, 3), -1)], epoch=runner.epoch)
    embedding.weight.data[poison] = kept
    assert torch.allclose(heir, clean, atol=1e-5)
    assert torch.allclose(heir_next[0], logits[1], atol=1e-5)


def test_a_base_kept_in_four_bits_serves_the_values_of_its_dequantized_copy(tmp_path: Path) -> None:
    base = build_base(tmp_path / "base", "qwen2", quantization="nf4")
    views = [write_adapter(tmp_path / method, base, method=method, as_view=True) for method in METHODS]
    answers: list[list[Row]] = []
    for keep in (True, False):
        runner = Runner(load_model(base, keep_quantized=keep), base, num_slots=len(views), num_blocks=32)
        for slot, view in enumerate(views):
            runner.write_slot(slot, runner.load_adapter(view))
        rows = [Row(prompt(8, seed=idx), slot=idx - 1) for idx in range(len(views) + 1)]
        decode(runner, rows, num_steps=4)
        answers.append(rows)
    for packed, plain in zip(*answers, strict=True):
        assert packed.token_ids == plain.token_ids
        for found, wanted in zip(packed.logits, plain.logits, strict=True):
            assert (found - wanted).abs().max().item() < 1e-4


def test_the_model_attends_only_inside_a_step(runner: Runner) -> None:
    with pytest.raises(RuntimeError, match=r"outside a step\. Use `Runner\.step`"):
        runner.model(input_ids=torch.tensor([[1, 2]]))
