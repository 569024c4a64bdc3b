"""Resident memory of this process and its children, from /proc (Linux only; zero elsewhere). Standard library alone."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["peak_mib", "resident_mib"]


def resident_mib() -> float:
    """MiB resident now, of this process and all its descendants."""
    return sum(_status_mib(pid, "VmRSS") for pid in _family())


def peak_mib() -> float:
    """Sum of the peaks of this process and its living descendants, in MiB."""
    return sum(_status_mib(pid, "VmHWM") for pid in _family())


def _family() -> list[int]:
    found = [os.getpid()]
    for pid in found:  # Grows while it is read: children, grandchildren, ...
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            found += [int(child) for child in _read(children).split()]
    return found


def _status_mib(pid: int, key: str) -> float:
    for line in _read(Path(f"/proc/{pid}/status")).splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    return 0.0


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:  # The process ended meanwhile.
        return ""
