"""What a result must say about where it came from."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

__all__ = ["describe_machine", "describe_revision"]

_PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes")


def describe_machine() -> dict[str, str]:
    """CPU model, number of CPUs, memory, Python and package versions."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = models[0] if models else cpu
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = {name: metadata.version(name) for name in _PACKAGES}
    return {
        "cpu": cpu,
        "num_cpus": str(os.cpu_count()),
        "memory_gib": f"{memory_gib:.0f}",
        "python": platform.python_version(),
        **packages,
    }


def describe_revision() -> str:
    """Return the git revision of the working tree, with `-dirty` when files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
