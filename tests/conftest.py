"""What holds for every test: a clean environment, an empty home, no network, two threads, a folder-backed real base."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from adapterhub.base.identity import Base, describe_base
from adapterhub.settings import load_settings

torch.set_num_threads(1)  # Tiny models gain nothing from more, and threads that wait for each other stall.

_REAL_BASE = "smollm2-135m-instruct"
_REAL_BASE_FOLDER = load_settings().bases_dir / _REAL_BASE  # Read before the environment is cleaned.
_connect = socket.socket.connect


def _connect_to_loopback_only(self: socket.socket, address: object) -> None:
    if self.family in (socket.AF_INET, socket.AF_INET6) and isinstance(address, tuple):
        host = str(address[0])
        if host != "localhost" and not ipaddress.ip_address(host).is_loopback:
            raise OSError(f"A test tried to reach {host!r}; tests may only use loopback addresses.")
    _connect(self, address)  # pyright: ignore[reportArgumentType]  # The address type depends on the family.


@pytest.fixture(autouse=True, scope="session")
def _loopback_only() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", _connect_to_loopback_only)
        yield


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for key in list(os.environ):
        if key.startswith("ADAPTERHUB_"):
            monkeypatch.delenv(key)
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def real_base() -> Base:
    """Give the embedded base with nf4; tests that use it carry the marker `real_base`."""
    if not (_REAL_BASE_FOLDER / "config.json").is_file():
        pytest.skip(f"{_REAL_BASE} is not in {_REAL_BASE_FOLDER.parent}; `hub base pull {_REAL_BASE}` fetches it")
    return describe_base(_REAL_BASE, _REAL_BASE_FOLDER, "nf4")
