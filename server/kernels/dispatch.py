"""Pick the kernel, once per process, and log which one and why.

Knows the names of the kernels and the device. A kernel is one module with a function `build_kernel`, imported
when it is picked, and one entry here.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from importlib.util import find_spec
from types import MappingProxyType

from adapterhub.errors import SettingsError, suggest
from server.kernels.base import Kernel
from server.kernels.native.library import find_library

__all__ = ["KERNELS", "load_kernel", "pick_kernel"]

_log = logging.getLogger(__name__)

# Name of a kernel -> the module that implements it.
KERNELS: Mapping[str, str] = MappingProxyType(
    {
        "cpu": "server.kernels.cpu",
        "native": "server.kernels.native.deltas",
        "reference": "server.kernels.reference",
        "triton": "server.kernels.triton",
    }
)


def load_kernel(name: str) -> Kernel:
    """Import and build the kernel called `name`, one of `KERNELS`, whether it can run here or not."""
    return importlib.import_module(KERNELS[name]).build_kernel()


def pick_kernel(name: str = "auto", *, device: str) -> Kernel:
    """Return the kernel called `name`, or the fastest for `device` ("cpu", "cuda") when `name` is "auto".

    Raises SettingsError for an unknown name, and for a kernel that cannot run here.
    """
    if name == "auto":
        return load_kernel(_fastest(device))
    if name not in KERNELS:
        near = suggest(name, KERNELS, otherwise="Use 'auto' to let the server choose.")
        raise SettingsError(f"Unknown kernel {name!r}; allowed: auto, {', '.join(sorted(KERNELS))}.", near)
    if name == "triton" and (device == "cpu" or not _has_triton()):
        raise SettingsError(
            f"The kernel 'triton' needs a GPU and the package 'triton'; this server runs on {device!r}"
            f"{'' if _has_triton() else ' without the package'}.",
            "Use 'auto' to let the server choose.",
        )
    _log.info("kernel %s: asked for by name", name)
    return load_kernel(name)


def _fastest(device: str) -> str:
    if device == "cpu":
        name = "cpu" if find_library() is None else "native"
        _log.info("kernel %s: the fastest for device 'cpu'", name)
        return name
    if _has_triton():
        _log.info("kernel triton: the fastest for device %r", device)
        return "triton"
    _log.warning("kernel cpu: 'triton' is not installed; on %r each segment costs two launches per linear", device)
    return "cpu"


def _has_triton() -> bool:
    return find_spec("triton") is not None
