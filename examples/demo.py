"""Train two adapters, serve them with the bare base from one process, and show answers and gains side by side.

Uses only what a user has: the `hub` command and the official `openai` client. Versions that exist are reused; pass
`--retrain` for new ones.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from openai import AsyncOpenAI
from rich.console import Console
from rich.table import Table

TASKS = ("summarize", "ask")
_HUB = str(Path(sys.executable).with_name("hub"))
_START_TIMEOUT_S = 120
_STOP_TIMEOUT_S = 20
_NUM_PROMPTS = 2
_console = Console()


def hub_json(*arguments: str) -> Any:
    """Run a `hub` command with --json and return what it printed."""
    done = subprocess.run([_HUB, *arguments, "--json"], stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout)


def train_missing(*, retrain: bool) -> list[str]:
    """Train each task that has no measured version for the base yet, or all of them; return a version of each."""
    base_digest = subprocess.run([_HUB, "base", "pull"], stdout=subprocess.PIPE, check=True, text=True).stdout.strip()
    published = {
        version["task"]: version["label"]
        for version in hub_json("adapters", "list")
        if version["base_digest"] == base_digest and is_measured(version["label"])
    }
    for task in TASKS:
        if task in published and not retrain:
            _console.print(f"[bold]{published[task]}[/] is there; `make demo DEMO_ARGS=--retrain` trains a new one.")
            continue
        _console.rule(f"hub train --task {task}")
        done = subprocess.run([_HUB, "train", "--task", task], stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            sys.exit(f"hub train --task {task} ended with exit code {done.returncode}; its reason is above.")
        published[task] = done.stdout.strip()
    return [published[task] for task in TASKS]


def is_measured(version: str) -> bool:
    """Tell whether a version carries an evaluation against the base."""
    return hub_json("adapters", "show", version)["manifest"]["evaluation"] is not None


@contextmanager
def server() -> Iterator[str]:
    """Start `hub serve` on a free port, yield its address, and stop it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([_HUB, "serve", "--port", str(port)])
    try:
        wait_ready(process, f"http://127.0.0.1:{port}/health/ready")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()


def wait_ready(process: subprocess.Popen[bytes], address: str) -> None:
    """Return when the server answers 200; stop the demo when it ended or takes too long."""
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            sys.exit(f"hub serve ended with exit code {process.returncode}; its messages are above.")
        try:
            if httpx.get(address, timeout=1).status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    sys.exit(f"hub serve was not ready after {_START_TIMEOUT_S} s.")


def held_out_prompts() -> list[tuple[str, list[dict[str, str]]]]:
    """(task, messages) pairs no adapter was trained on, alternating between the tasks."""
    rows = [hub_json("data", "sample", task, "--rows", str(_NUM_PROMPTS)) for task in TASKS]
    return [
        (task, sample["messages"])
        for samples in zip(*rows, strict=True)
        for task, sample in zip(TASKS, samples, strict=True)
    ]


async def ask(client: AsyncOpenAI, adapter: str, messages: list[Any]) -> tuple[str, str]:
    """Return (answer, version that gave it)."""
    answer = await client.chat.completions.create(
        model="base",
        messages=messages,
        max_tokens=48,
        temperature=0,
        extra_body={"adapter": adapter},
    )
    return (answer.choices[0].message.content or "").strip(), answer.model


async def show_answers(address: str, versions: list[str]) -> None:
    """Send every prompt to its adapter and to the bare base, all at once, and print the answers side by side."""
    client = AsyncOpenAI(base_url=address, api_key="none", max_retries=0)
    pairs = [(versions[TASKS.index(task)], messages) for task, messages in held_out_prompts()]
    start = time.monotonic()
    calls = [ask(client, adapter, messages) for version, messages in pairs for adapter in (version, "base")]
    answers = await asyncio.gather(*calls)
    _console.rule(f"{len(calls)} requests, {len(TASKS)} adapters and the base, in {time.monotonic() - start:.1f} s")
    for index, (_, messages) in enumerate(pairs):
        prompt = messages[-1]["content"]
        tuned, bare = answers[2 * index], answers[2 * index + 1]
        table = Table(
            "who", "answer", title=prompt if len(prompt) < 400 else f"{prompt[:400]} ...", title_justify="left"
        )
        table.add_row(tuned[1], tuned[0])
        table.add_row("base", bare[0])
        _console.print(table)


def show_gains(versions: list[str]) -> None:
    """Print what each adapter gained over the base on held-out rows, as stored with its version."""
    table = Table(
        "version", "metric", "rows", "base", "adapter", "difference, 95 % interval", title="Measured on held-out rows"
    )
    for version in versions:
        shown = hub_json("adapters", "show", version)
        e = shown["manifest"]["evaluation"]
        interval = f"{e['difference']:+.3f} [{e['interval_low']:+.3f}, {e['interval_high']:+.3f}]"
        cells = (e["metric"], str(e["num_rows"]), f"{e['base_score']:.3f}", f"{e['adapter_score']:.3f}", interval)
        table.add_row(shown["label"], *cells)
    _console.print(table)


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--retrain", action="store_true", help="train even where a version exists")
    versions = train_missing(retrain=parser.parse_args().retrain)
    with server() as address:
        asyncio.run(show_answers(address, versions))
    show_gains(versions)


if __name__ == "__main__":
    main()
