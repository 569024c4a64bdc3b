"""Pick the kernel, once per process, and log which one and why.

Knows the registered kernels and the device. A new kernel is one module with the two functions and one entry here.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import MappingProxyType

from adapterhub.errors import SettingsError, suggest
from server.kernels import cpu, reference
from server.kernels.base import Kernel

__all__ = ["KERNELS", "pick_kernel"]

_log = logging.getLogger(__name__)

KERNELS: Mapping[str, Kernel] = MappingProxyType(
    {
        "cpu": Kernel("cpu", cpu.scale_inputs, cpu.apply_deltas_),
        "reference": Kernel("reference", reference.scale_inputs, reference.apply_deltas_),
    }
)


def pick_kernel(name: str = "auto", *, device: str) -> Kernel:
    """Return the kernel called `name`, or the fastest for `device` ("cpu", "cuda") when `name` is "auto".

    Raises SettingsError for an unknown name.
    """
    if name != "auto":
        if name not in KERNELS:
            near = suggest(name, KERNELS, otherwise="Use 'auto' to let the server choose.")
            raise SettingsError(f"Unknown kernel {name!r}; allowed: auto, {', '.join(sorted(KERNELS))}.", near)
        _log.info("kernel %s: asked for by name", name)
        return KERNELS[name]
    if device == "cpu":
        _log.info("kernel cpu: the fastest for device 'cpu'")
    else:
        _log.warning("kernel cpu: none is written for device %r; each segment costs two launches per linear", device)
    return KERNELS["cpu"]
