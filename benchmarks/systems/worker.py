"""Run one system in this process: `python -m benchmarks.systems.worker MODULE JOB.json OUTCOME.json`.

Imports nothing but the system's own module, so that memory and threads are those of the system.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from benchmarks.systems.job import read_job, write_json

__all__ = ["main"]


def main() -> None:
    """Read the job, run it, write the outcome."""
    module, job_path, outcome_path = sys.argv[1:]
    system = importlib.import_module(f"benchmarks.systems.{module}")
    write_json(system.run(read_job(Path(job_path))), Path(outcome_path))


if __name__ == "__main__":
    main()
