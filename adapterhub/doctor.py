"""Look at this machine and say what is missing and how to get it. Knows packages, folders and ports, no tensors."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from adapterhub.base.catalogue import find_base
from adapterhub.errors import AdapterHubError
from adapterhub.settings import Settings

__all__ = ["Finding", "examine"]

_TORCH_PIN = "2.13.0"
# A run of the embedded base keeps float32 weights, NF4 source and optimizer state: about 2 GiB at its peak.
_MIN_MEMORY_GIB = 4.0
# Package download, GGUF file, converted base and runs together.
_MIN_DISK_GIB = 3.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    subject: str
    state: Literal["ok", "missing", "warning"]
    detail: str
    remedy: str = ""


def examine(settings: Settings) -> list[Finding]:
    """Run every check and create nothing; whatever a check raises becomes its finding."""
    checks: list[Callable[[Settings], Finding]] = [_python, _torch, _packages, _memory, _disk, _home, _base, _store]
    return [_finding(check, settings) for check in checks]


def _finding(check: Callable[[Settings], Finding], settings: Settings) -> Finding:
    subject = check.__name__.removeprefix("_")
    try:
        return check(settings)
    except AdapterHubError as exc:
        return Finding(subject, "missing", exc.what, exc.hint)
    except Exception as exc:  # The report must reach its end on a broken machine too.
        return Finding(subject, "missing", f"{type(exc).__name__}: {exc}", "Check paths and permissions.")


def _python(_: Settings) -> Finding:
    return Finding("python", "ok", ".".join(str(part) for part in sys.version_info[:3]))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch(_: Settings) -> Finding:
    version = _version("torch")
    if version is None:
        return Finding("torch", "missing", "not installed", f"pip install torch=={_TORCH_PIN}")
    if version.split("+")[0] != _TORCH_PIN:
        remedy = f"pip install torch=={_TORCH_PIN}, the version the project is tested with."
        return Finding("torch", "warning", version, remedy)
    return Finding("torch", "ok", version)


def _packages(_: Settings) -> Finding:
    needs = importlib.metadata.requires("adapterhub") or []
    names = [re.split(r"[^A-Za-z0-9._-]", need, maxsplit=1)[0] for need in needs if "extra ==" not in need]
    missing = sorted(name for name in names if _version(name) is None)
    if missing:
        return Finding("packages", "missing", ", ".join(missing), "pip install -c constraints.txt -e .")
    return Finding("packages", "ok", f"all {len(names)} present")


def _memory(_: Settings) -> Finding:
    try:
        total_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (ValueError, OSError, AttributeError):
        return Finding("memory", "warning", "unknown on this system", f"Make sure {_MIN_MEMORY_GIB:.0f} GiB are free.")
    detail = f"{total_gib:.1f} GiB, {os.cpu_count()} CPUs"
    if total_gib < _MIN_MEMORY_GIB:
        return Finding("memory", "warning", detail, f"Training the default base wants {_MIN_MEMORY_GIB:.0f} GiB.")
    return Finding("memory", "ok", detail)


def _nearest(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def _disk(settings: Settings) -> Finding:
    free_gib = shutil.disk_usage(_nearest(settings.home)).free / 2**30
    if free_gib < _MIN_DISK_GIB:
        return Finding(
            "disk", "warning", f"{free_gib:.1f} GiB free", f"Free {_MIN_DISK_GIB:.0f} GiB or set ADAPTERHUB_HOME."
        )
    return Finding("disk", "ok", f"{free_gib:.0f} GiB free")


def _home(settings: Settings) -> Finding:
    found = _nearest(settings.home)
    if not found.is_dir() or not os.access(found, os.W_OK):
        return Finding(
            "home", "missing", f"{found} is not a writable folder", "Set ADAPTERHUB_HOME to a writable folder."
        )
    note = "" if settings.home.exists() else ", made by the first command that writes"
    return Finding("home", "ok", f"{settings.home}{note}")


def _base(settings: Settings) -> Finding:
    base = find_base(None, settings)
    return Finding("base", "ok", f"{base.name} ({base.quantization})")


def _store(settings: Settings) -> Finding:
    if not settings.store_dir.is_dir():
        return Finding("store", "ok", "empty; the first publish creates it")
    from adapterhub.store import Store

    store = Store.open(settings.store_dir)
    try:
        num_rows = store.verify_log()
        num_versions = len(store.versions())
    finally:
        store.close()
    return Finding("store", "ok", f"{num_versions} versions, log of {num_rows} rows intact")
