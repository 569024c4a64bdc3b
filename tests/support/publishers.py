"""Processes that publish into a store at the same time, some of which kill themselves on the way.

One helper process imports what is needed and forks a child per job, so that many jobs cost one start of Python.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from adapterhub.store import PublishStep, Store
from tests.support.peft_folders import small_base

__all__ = ["TASK", "PublishJob", "run_publishers"]

TASK = "summarize"
_FAILED = 99  # No test publishes that many versions.


@dataclass(frozen=True)
class PublishJob:
    """Publish `folder` into the store in `root`; die by SIGKILL right after the step `last_step`."""

    root: str
    folder: str
    last_step: str = ""


def run_publishers(jobs: Sequence[PublishJob]) -> list[int]:
    """Run all jobs at once; return for each the number of its version, or minus the signal that ended it."""
    command = [sys.executable, "-m", __name__, json.dumps([asdict(job) for job in jobs])]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=True)
    return json.loads(done.stdout)


def _publish(job: PublishJob) -> int:
    def die_after(step: PublishStep) -> None:
        if step == job.last_step:
            os.kill(os.getpid(), signal.SIGKILL)

    with Store.open(Path(job.root)) as store:
        return store.publish(Path(job.folder), task=TASK, base=small_base(), on_step=die_after).number


def _fork(job: PublishJob) -> int:
    """Start a child whose exit code is the number of its version; return its process id."""
    child = os.fork()
    if child == 0:
        exit_code = _FAILED
        try:
            exit_code = _publish(job)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(exit_code)
    return child


if __name__ == "__main__":
    children = [_fork(PublishJob(**job)) for job in json.loads(sys.argv[1])]
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]))
