"""What the layers need to know about the step in progress; transformers offers no argument that reaches all of them.

A context manager sets it and refuses to nest. It belongs to one thread: other threads never see it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from server.kernels import Segments

if TYPE_CHECKING:
    from server.engine.attention import AttentionProbe, AttentionStep

__all__ = ["StepContext", "current_step", "step_context"]


@dataclass(frozen=True, slots=True)
class StepContext:
    """One step: segments is None when every token belongs to the base; attention is None outside the runner.

    gates: (T, L, K) float32, what each token gives to each expert of its slot in each decoder layer; None for ones.
    """

    segments: Segments | None = None
    attention: AttentionStep | AttentionProbe | None = None
    gates: Tensor | None = None


_CURRENT: ContextVar[StepContext | None] = ContextVar("adapterhub_step", default=None)


def current_step() -> StepContext | None:
    """Return the step in progress in this thread, or None."""
    return _CURRENT.get()


@contextmanager
def step_context(step: StepContext) -> Iterator[None]:
    """Make `step` the current one inside the block. Raises RuntimeError when a step is already in progress."""
    if _CURRENT.get() is not None:
        raise RuntimeError("A step is already in progress in this thread; steps do not nest. Finish it first.")
    token = _CURRENT.set(step)
    try:
        yield
    finally:
        _CURRENT.reset(token)
