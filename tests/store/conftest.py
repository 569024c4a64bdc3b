"""A store in a temporary folder, and adapter folders to publish."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from adapterhub.base.identity import Base
from adapterhub.store import Store
from tests.support.peft_folders import small_base, write_folder


@pytest.fixture
def base() -> Base:
    return small_base()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store") as opened:
        yield opened


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "adapter")


@pytest.fixture
def new_folder(tmp_path: Path) -> Callable[[int], Path]:
    """Write the adapter with that seed; each seed has other content."""

    def write(seed: int) -> Path:
        return write_folder(tmp_path / f"adapter-{seed}", seed=seed)

    return write
