"""Train every adapter method on one task under one protocol and tabulate what each costs and gains.

Each method runs `hub train` in its own process: same rows, steps, batches and held-out rows; the learning rate is the
method's own. Peak memory is the resident set of that process. Example:

    python -m benchmarks.methods --task ask --seeds 0
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe_machine, describe_revision

_METHODS = ("lora", "dora", "ia3", "adalora", "vera")
_RESULTS = Path(__file__).parent / "results"


def train_one(task: str, method: str, *, seed: int, extra: list[str]) -> dict[str, Any]:
    """Run one `hub train` and return its JSON with peak memory and file size added."""
    hub = str(Path(sys.executable).with_name("hub"))
    command = [hub, "train", "--task", task, "--method", method, "--seed", str(seed), "--no-publish", "--json", *extra]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed with exit code {os.waitstatus_to_exitcode(status)}")
    result = json.loads(printed)
    weights = Path(result["adapter"]) / "adapter_model.safetensors"
    return result | {
        "seed": seed,
        "peak_rss_mib": usage.ru_maxrss / 1024,
        "file_bytes": weights.stat().st_size,
    }


def show(runs: list[dict[str, Any]]) -> None:
    """Print one line per run."""
    first = runs[0]["evaluation"]
    title = f"{runs[0]['task']}: {first['metric']} on {first['num_rows']} held-out rows, base {first['base_score']:.3f}"
    table = Table(
        "method", "seed", "score", "gain [95 % interval]", "trainable", "file", "train", "peak memory", title=title
    )
    for run in runs:
        e = run["evaluation"]
        table.add_row(
            run["method"],
            str(run["seed"]),
            f"{e['adapter_score']:.3f}",
            f"{e['difference']:+.3f} ({e['interval_low']:+.3f} to {e['interval_high']:+.3f})",
            f"{run['trainable_parameters']:,}",
            f"{run['file_bytes'] / 1e6:.2f} MB",
            f"{run['train_s']:.0f} s",
            f"{run['peak_rss_mib'] / 1024:.1f} GiB",
        )
    Console(width=140).print(table)


def main() -> None:
    """Run the comparison and write benchmarks/results/methods-<task>.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", default="ask")
    parser.add_argument("--methods", nargs="+", default=list(_METHODS), choices=_METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    arguments, extra = parser.parse_known_args()
    runs = [
        train_one(arguments.task, method, seed=seed, extra=extra)
        for method in arguments.methods
        for seed in arguments.seeds
    ]
    path = _RESULTS / f"methods-{arguments.task}.json"
    path.parent.mkdir(exist_ok=True)
    for run in runs:
        del run["run"], run["adapter"]  # Places on the measuring machine.
    record = {"revision": describe_revision(), "machine": describe_machine(), "options": extra, "runs": runs}
    path.write_text(json.dumps(record, indent=1) + "\n")
    show(runs)


if __name__ == "__main__":
    main()
