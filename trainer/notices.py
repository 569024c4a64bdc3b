"""Keep notices that libraries write about each other off the terminal; none of them is the user's to correct."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["library_notices_ignored"]


@contextmanager
def library_notices_ignored() -> Iterator[None]:
    """Ignore warnings raised in PEFT, TRL, transformers and what they call; errors pass."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(peft|trl|transformers|bitsandbytes|accelerate|torch)\.")
        yield
