# ruff: noqa: ARG002 - the parameters are those of the callback interface
"""Report each training step: to the record, and to whoever draws a progress bar.

The bar itself is rich's; nothing here prints unless `live_progress` is used.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from adapterhub.errors import TrainingError
from adapterhub.records import MetricsPoint

__all__ = ["StepReport", "StepReporter", "live_evaluation", "live_training"]


@dataclass(frozen=True, slots=True)
class StepReport:
    """One finished step."""

    step: int
    num_steps: int
    loss: float
    tokens_per_s: float


class StepReporter(TrainerCallback):
    """Collect a MetricsPoint per step. Raises TrainingError as soon as the loss is not finite.

    step_tokens: real tokens (padding not counted) of each planned step.
    """

    def __init__(self, step_tokens: Sequence[int], on_step: Callable[[StepReport], None] | None) -> None:
        self.points: list[MetricsPoint] = []
        self.num_tokens = 0
        self._step_tokens = step_tokens
        self._on_step = on_step
        self._start = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self._start = time.monotonic()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Take the loss of the step; the summary at the end of training has none."""
        if logs is None or "loss" not in logs:
            return
        loss, step = float(logs["loss"]), state.global_step
        if not math.isfinite(loss):
            raise TrainingError(f"The loss is {loss} at step {step}.", "Lower `training.learning_rate`.")
        self.num_tokens += self._step_tokens[step - 1]
        tokens_per_s = self.num_tokens / max(time.monotonic() - self._start, 1e-9)
        self.points.append(
            MetricsPoint(
                step=step, loss=loss, learning_rate=float(logs.get("learning_rate", 0.0)), tokens_per_s=tokens_per_s
            )
        )
        if self._on_step is not None:
            self._on_step(StepReport(step, len(self._step_tokens), loss, tokens_per_s))


def _bar(console: Console, *columns: TextColumn) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *columns,
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


@contextmanager
def live_training(console: Console) -> Iterator[Callable[[StepReport], None]]:
    """Draw a bar with step, loss, tokens/s and time left; yields the function to call after each step."""
    columns = TextColumn("loss {task.fields[loss]}"), TextColumn("{task.fields[rate]} tokens/s")
    with _bar(console, *columns) as progress:
        bar = progress.add_task("training", total=None, loss="-", rate="-")

        def update(report: StepReport) -> None:
            progress.update(
                bar,
                completed=report.step,
                total=report.num_steps,
                loss=f"{report.loss:.3f}",
                rate=f"{report.tokens_per_s:.0f}",
            )

        yield update


@contextmanager
def live_evaluation(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Draw one bar per evaluated model; yields update(name, rows done, rows in all)."""
    with _bar(console) as progress:
        bars: dict[str, Any] = {}

        def update(name: str, done: int, total: int) -> None:
            if name not in bars:
                bars[name] = progress.add_task(f"evaluating {name}", total=total)
            progress.update(bars[name], completed=done)

        yield update
