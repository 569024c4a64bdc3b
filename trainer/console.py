"""Show a run to people: data report, masked sample, progress bars, the table of base against adapter. All on stderr."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from adapterhub.base import Base
from adapterhub.recipes import Recipe
from adapterhub.records import EvaluationRecord
from trainer.data import DataReport
from trainer.loop import TrainingResult
from trainer.progress import StepReport, live_evaluation, live_training
from trainer.run import RunView

__all__ = ["ConsoleView", "print_evaluation", "print_report"]

_SAMPLE_CHARS = 160  # Two lines of a terminal from each end of the prompt.


def print_report(console: Console, report: DataReport) -> None:
    """Print how many rows are used and why others are not, and one row with its mask."""
    left_out = [
        (report.num_left_out_by_pattern, "left out by the recipe's patterns"),
        (report.num_left_out_by_length, "left out by length"),
        (report.num_duplicates, "duplicates"),
    ]
    notes = "".join(f", {count} {why}" for count, why in left_out if count)
    console.print(
        f"[bold]data[/] {report.num_rows} rows read{notes}; {report.num_train} train, {report.num_held_out} held out; "
        f"{report.mean_row_tokens:.0f} tokens a row (longest {report.longest_row_tokens}), "
        f"{report.loss_share:.0%} of them with loss"
    )
    prompt = report.sample_prompt
    if len(prompt) > 2 * _SAMPLE_CHARS:
        prompt = f"{prompt[:_SAMPLE_CHARS]} ... {prompt[-_SAMPLE_CHARS:]}"
    console.print(f"[dim]no loss:[/] [dim]{escape(repr(prompt))}[/]", highlight=False)
    console.print(f"[dim]   loss:[/] {escape(repr(report.sample_answer))}", highlight=False)


def print_evaluation(
    console: Console,
    record: EvaluationRecord,
    *,
    max_new_tokens: int,
    first: str = "base",
    second: str = "adapter",
) -> None:
    """Print the table, and who was cut off by the limit: such answers score low for a reason of ours."""
    console.print(_evaluation_table(record, first=first, second=second))
    for name, count in ((first, record.num_base_unfinished), (second, record.num_adapter_unfinished)):
        if count:
            console.print(
                f"{name} ran into the limit of {max_new_tokens} tokens on {count} of {record.num_rows} rows",
                soft_wrap=True,
            )


def _evaluation_table(record: EvaluationRecord, *, first: str, second: str) -> Table:
    """One line: score of both and the paired difference with its interval."""
    table = Table(title=f"{record.metric} on {record.num_rows} held-out rows")
    for name in (first, second, "difference", f"{record.confidence:.0%} interval (paired t)"):
        table.add_column(name, justify="right")
    table.add_row(
        f"{record.base_score:.4f}",
        f"{record.adapter_score:.4f}",
        f"{record.difference:+.4f}",
        f"[{record.interval_low:+.4f}, {record.interval_high:+.4f}]".replace("[", "\\["),
    )
    return table


class ConsoleView(RunView):
    """Print each stage on a console."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def data(self, report: DataReport) -> None:
        """Print the data report."""
        print_report(self._console, report)

    def loading(self, base: Base) -> AbstractContextManager[Any]:
        """Spin while the base loads."""
        return self._console.status(f"loading base {base.name} ({base.quantization}) ...")

    def training(self) -> AbstractContextManager[Callable[[StepReport], None]]:
        """Draw the training bar."""
        return live_training(self._console)

    def evaluating(self) -> AbstractContextManager[Callable[[str, int, int], None]]:
        """Draw the evaluation bars."""
        return live_evaluation(self._console)

    def trained(self, result: TrainingResult) -> None:
        """Print size, tokens and time."""
        rate = result.num_train_tokens / max(result.wall_time_s, 1e-9)
        self._console.print(
            f"[bold]trained[/] {result.num_trainable_parameters:,} values on {result.num_train_tokens:,} tokens "
            f"in {result.wall_time_s:.0f} s ({rate:.0f} tokens/s)"
        )

    def evaluated(self, record: EvaluationRecord, recipe: Recipe) -> None:
        """Print the table."""
        print_evaluation(self._console, record, max_new_tokens=recipe.generation.max_new_tokens)
