"""The one training loop: TRL's SFTTrainer with PEFT, our loss, our batches, our guards.

Float32 arithmetic throughout: the embedded target is a CPU without bfloat16 units, and updates of IA3 are smaller than
a bfloat16 step. No gradient checkpointing: it saves memory, which adapters hardly use, and costs a forward pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from adapterhub.base import Base
from adapterhub.errors import TrainingError
from adapterhub.recipes import Recipe, Training
from adapterhub.records import Method, MetricsPoint
from trainer.data.batches import PlannedSampler, collate, pad_token, plan_batches
from trainer.data.tokens import TokenRow
from trainer.loss import label_loss
from trainer.methods.adalora import AdaLoraDriver, fully_pruned, orthogonality_loss
from trainer.methods.configs import build_peft_config
from trainer.methods.guards import check_all_moved, keep_float32_, snapshot, stop_repacking_
from trainer.notices import library_notices_ignored
from trainer.progress import StepReport, StepReporter
from trainer.schedule import learning_rate_factor

__all__ = ["TrainingResult", "held_out_loss", "train"]

_EVAL_BATCH_ROWS = 8


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """A trained PEFT model and what the run measured."""

    model: Any
    metrics: tuple[MetricsPoint, ...]
    num_train_tokens: int
    num_trainable_parameters: int
    wall_time_s: float


class _Trainer(SFTTrainer):
    """SFTTrainer whose loss looks at labelled positions only and whose batches are planned."""

    def __init__(self, *, sampler: PlannedSampler, recipe: Recipe, **kwargs: Any) -> None:
        self._sampler = sampler
        self._training = recipe.training
        self._is_adalora = recipe.method is Method.ADALORA
        self._token_loss = torch.tensor(0.0)
        super().__init__(**kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> PlannedSampler:  # noqa: ARG002
        return self._sampler

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:  # noqa: ARG002
        """Our own schedule, see `trainer.schedule`."""
        target: Any = optimizer or self.optimizer
        self.lr_scheduler = LambdaLR(target, partial(learning_rate_factor, training=self._training))
        return self.lr_scheduler

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Sum of the loss over target tokens / their number, and AdaLoRA's orthogonality term. () float32."""
        assert not return_outputs, "evaluation does not go through the Trainer"
        loss_sum, num_targets = label_loss(model, inputs)
        loss = loss_sum / (num_targets if num_items_in_batch is None else num_items_in_batch)
        self._token_loss = loss.detach()
        return loss + orthogonality_loss(model) if self._is_adalora else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Report the loss of the tokens alone, so that curves of all methods can be compared."""
        if "loss" in logs and self._is_adalora:
            logs["loss"] = float(self._token_loss)
        super().log(logs, start_time)


def train(
    model: PreTrainedModel,
    rows: Sequence[TokenRow],
    *,
    recipe: Recipe,
    base: Base,
    tokenizer: PreTrainedTokenizerBase,
    run_folder: Path,
    on_step: Callable[[StepReport], None] | None = None,
) -> TrainingResult:
    """Train an adapter of the recipe's method on `rows`; `model` is wrapped in place by PEFT.

    recipe: resolved and filled in, see `trainer.methods.fill_in`. Raises TrainingError when the loss is not finite or a
    trainable tensor did not move. The same seed, rows and machine give the same bits.
    """
    stop_repacking_(model)
    training = recipe.training
    lengths = [len(row.prompt_ids) + len(row.answer_ids) for row in rows]
    plan = plan_batches(lengths, batch_size=training.batch_size, num_steps=training.max_steps, seed=training.seed)
    reporter = StepReporter([sum(lengths[idx] for idx in batch) for batch in plan], on_step)
    callbacks: list[TrainerCallback] = [reporter]
    is_adalora = recipe.method is Method.ADALORA
    if is_adalora:
        callbacks.append(AdaLoraDriver())
    with library_notices_ignored():
        trainer = _Trainer(
            sampler=PlannedSampler(plan),
            recipe=recipe,
            model=model,
            args=_arguments(training, run_folder, device=model.device),
            data_collator=partial(collate, pad_token_id=pad_token(tokenizer)),
            train_dataset=Dataset.from_list([{"input_ids": row.input_ids, "labels": row.labels} for row in rows]),
            processing_class=tokenizer,
            peft_config=build_peft_config(recipe, base),
            callbacks=callbacks,
        )
        trainer.remove_callback(PrinterCallback)  # It writes a line per step; ours reports.
        wrapped: Any = trainer.model
        num_trainable = keep_float32_(wrapped)
        before = snapshot(wrapped)
        start = time.monotonic()
        trainer.train()
    wall_time_s = time.monotonic() - start
    check_all_moved(wrapped, before, pruned=fully_pruned(wrapped) if is_adalora else frozenset())
    return TrainingResult(
        model=wrapped.eval(),
        metrics=tuple(reporter.points),
        num_train_tokens=reporter.num_tokens,
        num_trainable_parameters=num_trainable,
        wall_time_s=wall_time_s,
    )


def _arguments(training: Training, run_folder: Path, *, device: torch.device) -> SFTConfig:
    return SFTConfig(
        output_dir=str(run_folder / "trainer"),
        max_steps=training.max_steps,
        per_device_train_batch_size=training.batch_size,
        learning_rate=training.learning_rate or 0.0,
        weight_decay=training.weight_decay or 0.0,
        max_grad_norm=training.max_grad_norm,
        seed=training.seed,
        data_seed=training.seed,
        use_cpu=device.type == "cpu",
        bf16=False,
        fp16=False,
        gradient_checkpointing=False,
        max_length=None,  # Rows were cut or left out, and counted, before.
        shuffle_dataset=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        optim="adamw_torch",
    )


@torch.no_grad()
def held_out_loss(model: Any, rows: Sequence[TokenRow], *, pad_token_id: int) -> float:
    """Mean loss per answer token over rows, in nats."""
    total, count = 0.0, 0
    for start in range(0, len(rows), _EVAL_BATCH_ROWS):
        part = [{"input_ids": row.input_ids, "labels": row.labels} for row in rows[start : start + _EVAL_BATCH_ROWS]]
        batch = {key: value.to(model.device) for key, value in collate(part, pad_token_id=pad_token_id).items()}
        loss_sum, num_targets = label_loss(model, batch)
        total += float(loss_sum)
        count += num_targets
    if not count:
        raise TrainingError("There is no row to measure the loss on.", "Hold out at least one row.")
    return total / count
