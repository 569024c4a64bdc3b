"""What each arithmetic costs in accuracy: perplexity on fixed text, and the task metric of the shipped adapters.

    python -m benchmarks.accuracy
    python -m benchmarks.accuracy --documents 4 --document-tokens 32 --tasks summarize --rows 4 --out FILE

Text: XSum documents that no recipe trains on, one row each, token by token through the engine's runner, as decoding
does it. Task metric: greedy answers of the engine to held-out rows of the recipe. Adapters that are not there yet are
trained with `hub train` into `--cache`/trained, about five minutes each on two cores.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from adapterhub.base.catalogue import pull_base
from adapterhub.base.identity import Base
from adapterhub.base.loading import load_model, load_tokenizer, use_threads
from adapterhub.base.prompts import text_token_ids
from adapterhub.errors import JobFailedError, UserInputError
from adapterhub.recipes import load_recipe
from adapterhub.settings import Settings
from adapterhub.store import Store
from benchmarks.machine import describe_machine, describe_revision
from benchmarks.options import run_command
from benchmarks.systems.ours import running_engine
from server.engine.runner import Runner, StepRow
from server.engine.types import AdapterHandle, Engine, ErrorEvent, GenerateRequest, SamplingParams, TokenEvent
from server.http.adapters import AdapterNames
from server.products import Compute
from trainer.data.prepare import data_file
from trainer.metrics import build_scorer, paired_difference
from trainer.run import prepare_data

__all__ = ["AccuracyConfig", "main"]

_RESULT = Path(__file__).parent / "results" / "serving-accuracy.json"
_COMPUTES: tuple[Compute, ...] = ("float32", "int8")
_BLOCK_TOKENS = 16
_FIRST_TOKEN = "<|endoftext|>"  # Separates documents in the pre-training data of SmolLM2.
_CONCURRENCY = 32  # Rows of one step.


class AccuracyConfig(BaseModel):
    """One measurement. documents x document_tokens tokens are predicted; rows are held-out rows per task."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    documents: int = Field(default=32, ge=1, le=256)
    document_tokens: int = Field(default=512, ge=2, le=2048)
    tasks: tuple[str, ...] = ("summarize", "ask")
    rows: int = Field(default=64, ge=2, le=1000)
    threads: int = Field(default_factory=lambda: os.cpu_count() or 1, ge=1)


def _documents(base: Base, config: AccuracyConfig, settings: Settings) -> list[list[int]]:
    """Return held-out documents of at least the wanted length, cut to it, begun with the end-of-text token."""
    tokenizer = load_tokenizer(base)
    recipe = load_recipe("summarize", settings)
    lines = data_file(recipe.data, settings).read_text(encoding="utf-8").splitlines()
    held_out = prepare_data(recipe, settings=settings, tokenizer=tokenizer).held_out
    encoded = [text_token_ids(tokenizer, json.loads(lines[row.line - 1])["document"]) for row in held_out]
    start = text_token_ids(tokenizer, _FIRST_TOKEN)[0]
    fitting = [[start, *ids[: config.document_tokens]] for ids in encoded if len(ids) >= config.document_tokens]
    if len(fitting) < config.documents:
        raise UserInputError(
            f"--documents is {config.documents}, but only {len(fitting)} held-out documents have "
            f"{config.document_tokens} tokens.",
            "Lower --documents or --document-tokens.",
        )
    return fitting[: config.documents]


def perplexity(runner: Runner, documents: Sequence[Sequence[int]]) -> float:
    """Exp of the mean negative log-likelihood of every token after the first, natural logarithm.

    documents: all of one length; they advance together, one token per step and row.
    """
    num_blocks = -(-len(documents[0]) // _BLOCK_TOKENS)
    total = 0.0
    for position in range(len(documents[0]) - 1):
        rows = [
            StepRow(
                token_ids=(document[position],),
                start=position,
                block_ids=tuple(range(idx * num_blocks, (idx + 1) * num_blocks)),
                slot=-1,
            )
            for idx, document in enumerate(documents)
        ]
        logprobs = torch.log_softmax(runner.step(rows, epoch=runner.epoch), dim=-1)
        total -= sum(float(row[document[position + 1]]) for row, document in zip(logprobs, documents, strict=True))
    return math.exp(total / (len(documents) * (len(documents[0]) - 1)))


def _reference_perplexity(base: Base, documents: Sequence[Sequence[int]]) -> float:
    """Return the same number from transformers, which sees each document at once."""
    model: Any = load_model(base)
    total = 0.0
    for document in documents:
        ids = torch.tensor([list(document)])
        with torch.inference_mode():
            logprobs = torch.log_softmax(model(input_ids=ids).logits[0, :-1], dim=-1)
        total -= float(logprobs.gather(1, ids[0, 1:, None]).sum())
    return math.exp(total / sum(len(document) - 1 for document in documents))


def _measure_perplexity(base: Base, config: AccuracyConfig, settings: Settings) -> dict[str, float]:
    documents = _documents(base, config, settings)
    result = {"transformers": _reference_perplexity(base, documents)}
    num_blocks = len(documents) * -(-len(documents[0]) // _BLOCK_TOKENS)
    for compute in _COMPUTES:
        runner = Runner(
            load_model(base), base, num_slots=1, num_blocks=num_blocks, block_size=_BLOCK_TOKENS, compute=compute
        )
        result[compute] = perplexity(runner, documents)
        print(f"perplexity {compute}: {result[compute]:.3f} (transformers {result['transformers']:.3f})", flush=True)
    return result


def _train_missing(tasks: Sequence[str], base: Base, *, home: Path, settings: Settings) -> None:
    """Train and publish what the store in `home` lacks, with the shipped recipes. Raises JobFailedError."""
    home.mkdir(parents=True, exist_ok=True)
    if not (home / "assets").exists():
        (home / "assets").symlink_to(settings.assets_dir)
    with Store.open(home / "store") as store:
        missing = [task for task in tasks if task not in store.tasks()]
    hub = str(Path(sys.executable).with_name("hub"))
    environment = {**os.environ, "ADAPTERHUB_HOME": str(home), "ADAPTERHUB_BASE": str(base.folder)}
    for task in missing:
        print(f"training {task}", flush=True)
        if subprocess.run([hub, "train", "--task", task], env=environment, check=False).returncode:
            raise JobFailedError(
                f"`hub train --task {task}` failed; what it printed stands above.",
                f"Start again, or leave it out with --tasks; what is trained stays in {str(home)!r}.",
            )


async def _answers(
    engine: Engine, prompts: Sequence[Sequence[int]], handle: AdapterHandle, *, num_tokens: int
) -> list[str]:
    """Answer greedily until the stop token or `num_tokens`. Raises what the engine reports."""
    places = asyncio.Semaphore(_CONCURRENCY)

    async def one(idx: int) -> str:
        request = GenerateRequest(
            request_id=f"r{idx}",
            prompt_token_ids=tuple(prompts[idx]),
            adapter=handle,
            sampling=SamplingParams(max_tokens=num_tokens),
        )
        text = ""
        async with places, aclosing(engine.generate(request)) as events:
            async for event in events:
                if isinstance(event, ErrorEvent):
                    raise event.error
                text += event.text if isinstance(event, TokenEvent) else ""
        return text

    return list(await asyncio.gather(*(one(idx) for idx in range(len(prompts)))))


async def _measure_task(
    task: str, base: Base, config: AccuracyConfig, *, store: Store, settings: Settings
) -> dict[str, Any]:
    """Score the task's adapter in both arithmetics on the same rows, and their paired difference."""
    recipe = load_recipe(task, settings)
    rows = prepare_data(recipe, settings=settings, tokenizer=load_tokenizer(base)).held_out[: config.rows]
    handle = AdapterNames(store, base).resolve(task).handle
    assert handle is not None, "a task is never the base"
    score = build_scorer(recipe)
    scores: dict[str, list[float]] = {}
    for compute in _COMPUTES:
        async with running_engine(base, num_slots=1, threads=config.threads, compute=compute) as engine:
            answers = await _answers(
                engine, [row.prompt_ids for row in rows], handle, num_tokens=recipe.generation.max_new_tokens
            )
        scores[compute] = [score(answer, row.target) for answer, row in zip(answers, rows, strict=True)]
    difference = paired_difference(scores["float32"], scores["int8"], confidence=recipe.gate.confidence)
    means = {compute: sum(values) / len(values) for compute, values in scores.items()}
    print(f"{task} {recipe.metric}: {means}", flush=True)
    return {
        "metric": recipe.metric,
        "num_rows": len(rows),
        **means,
        "difference": difference.mean,
        "low": difference.low,
        "high": difference.high,
    }


def measure(config: AccuracyConfig, *, settings: Settings, cache: Path, out: Path) -> None:
    """Measure everything and write the result."""
    use_threads(Settings(threads=config.threads))
    base = pull_base(None, settings)
    result: dict[str, Any] = {
        "revision": describe_revision(),
        "machine": describe_machine(),
        "base": base.name,
        "quantization": base.quantization,
        "config": config.model_dump(mode="json"),
        "perplexity": _measure_perplexity(base, config, settings),
        "tasks": {},
    }
    home = cache / "trained"
    _train_missing(config.tasks, base, home=home, settings=settings)
    with Store.open(home / "store") as store:
        for task in config.tasks:
            measured = asyncio.run(_measure_task(task, base, config, store=store, settings=settings))
            result["tasks"][task] = measured
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the result; exits with 2 for wrong options."""
    run_command(
        measure, AccuracyConfig, arguments, about=__doc__, cache_help="folder of the trained adapters", result=_RESULT
    )


if __name__ == "__main__":
    main()
