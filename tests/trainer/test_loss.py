from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional

from adapterhub.base.loading import load_model, load_tokenizer
from tests.support.tiny_models import build_base
from tests.support.training import echo_rows
from trainer.data.batches import collate
from trainer.data.tokens import IGNORED
from trainer.loss import label_loss
from trainer.notices import library_notices_ignored


def full_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The plain path: logits at every position, labels shifted by one."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return functional.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]), batch["labels"][:, 1:].reshape(-1), reduction="sum"
    )


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi"])
def test_loss_and_gradients_equal_those_of_logits_at_every_position(tmp_path: Path, family: str) -> None:
    base = build_base(tmp_path / "base", family)
    tokenizer = load_tokenizer(base)
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    with library_notices_ignored():
        model = get_peft_model(load_model(base), config)
    rows = [{"input_ids": row.input_ids, "labels": row.labels} for row in echo_rows(tokenizer, num_rows=6)]
    batch = partial(collate, pad_token_id=0)(rows)
    expected = full_loss(model, batch)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    loss, num_labels = label_loss(model, batch)
    loss.backward()
    assert num_labels == int((batch["labels"] != IGNORED).sum())
    torch.testing.assert_close(loss, expected)
    assert gradients
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name])


def test_the_head_runs_on_labelled_positions_only_and_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    base = build_base(tmp_path / "base")
    model: Any = load_model(base)
    rows = [{"input_ids": row.input_ids, "labels": row.labels} for row in echo_rows(load_tokenizer(base), num_rows=4)]
    batch = collate(rows, pad_token_id=0)
    seen: list[tuple[int, ...]] = []
    handle = model.lm_head.register_forward_hook(lambda _m, args, _out: seen.append(tuple(args[0].shape)))
    _, num_labels = label_loss(model, batch)
    handle.remove()
    assert seen == [(1, num_labels, 64)]
    assert model(input_ids=batch["input_ids"]).logits.shape[:2] == batch["input_ids"].shape
