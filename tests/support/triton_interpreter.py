"""Runs steps through the Triton kernel on a CPU: in a process of its own, since Triton chooses its mode at import."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

from torch import Tensor

from tests.support.kernel_cases import Case, run_cases

_Results = list[tuple[Tensor, list[Tensor]]]


class Interpreter:
    """Triton's interpreter in another process."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool

    def run(self, cases: Sequence[Case]) -> _Results:
        """Return what `tests.support.kernel_cases.run_cases` returns for the Triton kernel."""
        # As bytes: tensors would otherwise travel through shared memory, one file descriptor each.
        return pickle.loads(self._pool.submit(_run, pickle.dumps(list(cases))).result())


@contextmanager
def interpreter() -> Iterator[Interpreter]:
    """Start the process, and end it with the block."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=_start) as pool:
        yield Interpreter(pool)


def _start() -> None:
    os.environ["TRITON_INTERPRET"] = "1"


def _run(payload: bytes) -> bytes:
    from server.kernels.triton import build_kernel

    return pickle.dumps(run_cases(build_kernel(), pickle.loads(payload)))
