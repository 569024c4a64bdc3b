"""From a recipe to checked, tokenized, split rows: everything that can go wrong with data goes wrong here.

Loads a tokenizer but no model, so bad data stops a run within seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.assets import fetch_data
from adapterhub.digests import file_sha256
from adapterhub.errors import DataError
from adapterhub.recipes import DataSource, Recipe
from adapterhub.settings import Settings
from trainer.data.files import written_whole
from trainer.data.rows import ParsedRows, read_examples
from trainer.data.split import deduplicate, split_rows
from trainer.data.tokens import TokenRow, answer_stop_token, encode, masked_sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["DataReport", "PreparedData", "data_file", "prepare"]


@dataclass(frozen=True, slots=True)
class DataReport:
    """What happened to the rows of a file, and one sample with its mask."""

    file: str
    num_rows: int
    num_left_out_by_pattern: int
    num_left_out_by_length: int
    num_duplicates: int
    num_train: int
    num_held_out: int
    longest_row_tokens: int
    mean_row_tokens: float
    loss_share: float
    sample_prompt: str
    sample_answer: str


@dataclass(frozen=True, slots=True)
class PreparedData:
    """Rows to train on, rows to measure on, and the evidence."""

    train: tuple[TokenRow, ...]
    held_out: tuple[TokenRow, ...]
    digests: dict[str, str]
    report: DataReport


def data_file(source: DataSource, settings: Settings) -> Path:
    """Return the JSON-lines file of a source, fetching it on first use."""
    if source.asset is not None:
        return fetch_data(source.asset, settings)
    if source.file is not None:
        return source.file
    return _hub_file(source, settings)


def _hub_file(source: DataSource, settings: Settings) -> Path:
    """Write a hub data set as JSON lines once; later runs read that file."""
    from datasets import load_dataset

    name = "--".join([str(source.hub).replace("/", "--"), source.config or "default", source.split])
    path = settings.assets_dir / "hub" / f"{name}.jsonl"
    if not path.is_file():
        try:
            rows = load_dataset(str(source.hub), source.config, split=source.split)
        except Exception as exc:  # The library raises many kinds: missing, gated, offline, malformed.
            raise DataError(
                f"Data set {source.hub!r} (split {source.split!r}) could not be loaded: {exc}.",
                "Check the id, the split and the network, or give a local file with `--data FILE`.",
            ) from exc
        with written_whole(path) as scratch:
            rows.to_json(scratch, force_ascii=False)
    return path


def prepare(path: Path, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreparedData:
    """Check every row of `path`, tokenize, deduplicate and split. Raises DataError; see `trainer.data.rows`."""
    parsed = read_examples(path, recipe)
    encoded = list(encode(parsed.examples, recipe, tokenizer))
    fitting = [row for row in encoded if row is not None]
    if not fitting:
        raise DataError(
            f"None of the {len(encoded)} rows of {path} passes the filter and the limit of "
            f"{recipe.training.max_length} tokens.",
            "Raise `training.max_length`, or shorten prompts with `prompt.truncate`.",
        )
    unique = deduplicate(fitting) if recipe.split.deduplicate else fitting
    train, held_out = split_rows(unique, recipe.split)
    _check_labels(train, tokenizer)
    report = _report(path, parsed, (len(encoded), len(fitting), len(unique)), (train, held_out), tokenizer)
    return PreparedData(tuple(train), tuple(held_out), {path.name: file_sha256(path)}, report)


def _check_labels(rows: list[TokenRow], tokenizer: PreTrainedTokenizerBase) -> None:
    """Our own promise: the last label is the stop token, and the prompt has none."""
    stop = answer_stop_token(tokenizer)
    for row in rows:
        labels = row.labels
        assert labels[-1] == stop, f"row of line {row.line} does not end with the stop token"
        assert labels[: len(row.prompt_ids)] == [-100] * len(row.prompt_ids), f"line {row.line} trains on its prompt"


def _report(
    path: Path,
    parsed: ParsedRows,
    counts: tuple[int, int, int],
    sides: tuple[list[TokenRow], list[TokenRow]],
    tokenizer: PreTrainedTokenizerBase,
) -> DataReport:
    num_encoded, num_fitting, num_unique = counts
    train, held_out = sides
    lengths = [len(row.prompt_ids) + len(row.answer_ids) for row in train]
    prompt, answer = masked_sample(train[0], tokenizer)
    return DataReport(
        file=str(path),
        num_rows=parsed.num_rows,
        num_left_out_by_pattern=parsed.num_left_out,
        num_left_out_by_length=num_encoded - num_fitting,
        num_duplicates=num_fitting - num_unique,
        num_train=len(train),
        num_held_out=len(held_out),
        longest_row_tokens=max(lengths),
        mean_row_tokens=sum(lengths) / len(lengths),
        loss_share=sum(len(row.answer_ids) for row in train) / sum(lengths),
        sample_prompt=prompt,
        sample_answer=answer,
    )
