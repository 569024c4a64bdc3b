"""The compiled kernels, without which their tests mean nothing: missing on Linux is a failure, elsewhere a skip."""

from __future__ import annotations

import sys

import pytest

from server.kernels.native import Library, find_library

__all__ = ["require_library"]


def require_library() -> Library:
    """Return the library, or end the test."""
    if sys.platform != "linux":
        pytest.skip(f"no compiled kernels on {sys.platform}")
    found = find_library()
    assert found is not None, "the kernels do not compile; the warning says why"
    return found
