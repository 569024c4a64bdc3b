"""What was freed goes back to the system, though a piece that lives on lies above it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from server.engine.heap import release_freed

_NUM_PIECES, _PIECE_FLOATS = 2_000, 16_000  # 64 kB each: too small for glibc to map alone, 128 MB in all.


def resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(sys.platform != "linux", reason="only the C library of Linux is asked")
def test_memory_below_a_piece_that_lives_on_is_given_back() -> None:
    pieces = [torch.ones(_PIECE_FLOATS) for _ in range(_NUM_PIECES)]
    last = torch.ones(_PIECE_FLOATS)
    pieces.clear()
    before = resident_bytes()
    release_freed()
    assert before - resident_bytes() > _NUM_PIECES * _PIECE_FLOATS * 4 / 2
    assert bool((last == 1).all())
