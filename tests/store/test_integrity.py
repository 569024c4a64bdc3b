"""Damage: a flipped byte is found and named, damaged views heal, old scratch goes, foreign catalogues are refused."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from adapterhub.base.identity import Base
from adapterhub.errors import JobFailedError, OverloadedError, StoreCorruptError, UserInputError
from adapterhub.store import Limits, Store, Version
from adapterhub.store import catalogue as catalogue_module


@pytest.fixture
def version(store: Store, base: Base, folder: Path) -> Version:
    return store.publish(folder, task="summarize", base=base)


def _flip_byte(path: Path) -> None:
    path.chmod(0o644)
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(bytes(raw))


def _blob(root: Path, store: Store, version: Version, name: str) -> Path:
    digest = store.manifest(version).files[name]
    return root / "store" / "blobs" / "sha256" / digest[:2] / digest


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_flipped_byte_is_reported_by_name_and_never_served(
    name: str, store: Store, version: Version, tmp_path: Path
) -> None:
    blob = _blob(tmp_path, store, version, name)
    _flip_byte(blob)
    with pytest.raises(StoreCorruptError) as caught:
        store.verify("summarize@v1")
    assert caught.value.what == (
        f"File {name!r} of summarize@v1 (sha256:{blob.name[:12]}) has other bytes than were published: {blob}."
    )
    assert caught.value.hint == "Import the same adapter again to repair it, or restore the store from a backup."
    assert list(store.find_damage()) == ["summarize@v1"]
    with pytest.raises(StoreCorruptError, match="has other bytes than were published"):
        store.view(version.serving_digest)


def test_a_missing_blob_is_reported(store: Store, version: Version, tmp_path: Path) -> None:
    _blob(tmp_path, store, version, "adapter_model.safetensors").unlink()
    with pytest.raises(StoreCorruptError, match="is missing"):
        store.verify("summarize")


def test_publishing_the_same_adapter_again_repairs_it(
    store: Store, version: Version, base: Base, folder: Path, tmp_path: Path
) -> None:
    _flip_byte(_blob(tmp_path, store, version, "adapter_model.safetensors"))
    assert store.publish(folder, task="summarize", base=base) == version
    store.verify("summarize@v1")
    assert list((tmp_path / "store" / "quarantine").iterdir())
    assert store.find_damage() == {}


def test_a_changed_manifest_is_reported(store: Store, version: Version, tmp_path: Path) -> None:
    _flip_byte(next((tmp_path / "store" / "manifests").rglob(version.manifest_digest)))
    with pytest.raises(StoreCorruptError, match=r"The manifest of summarize@v1 \(sha256:.*\) has other bytes"):
        store.manifest(version)


@pytest.mark.usefixtures("version")
def test_a_version_row_that_points_elsewhere_is_reported(store: Store, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "store" / "catalogue.sqlite")) as connection:
        connection.execute("DROP TRIGGER versions_no_update")
        connection.execute("UPDATE versions SET serving_digest = ?", ("0" * 64,))
        connection.commit()
    with pytest.raises(StoreCorruptError, match=r"The manifest of summarize@v1 belongs to 'summarize' sha256:"):
        store.verify("summarize@v1")


@pytest.mark.usefixtures("version")
def test_a_row_with_another_base_is_reported(store: Store, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "store" / "catalogue.sqlite")) as connection:
        connection.execute("DROP TRIGGER versions_no_update")
        connection.execute("UPDATE versions SET base_digest = ?", ("0" * 64,))
        connection.commit()
    with pytest.raises(StoreCorruptError, match=r"The files of summarize@v1 give sha256:.*, not sha256:"):
        store.verify("summarize@v1")


@pytest.mark.parametrize("content", [b"", b"other", None])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "adapterhub.json"])
def test_a_damaged_view_is_found_and_built_again(
    name: str, content: bytes | None, store: Store, version: Version, tmp_path: Path
) -> None:
    view = store.view(version.serving_digest)
    intact = (view / name).read_bytes()
    (view / name).unlink()
    if content is not None:
        (view / name).write_bytes(content)
    with pytest.raises(StoreCorruptError, match=rf"File '{name}' in the view of summarize@v1"):
        store.verify("summarize@v1")
    assert store.view(version.serving_digest) == view
    assert (view / name).read_bytes() == intact
    store.verify("summarize@v1")
    assert len(list((tmp_path / "store" / "quarantine").iterdir())) == 1


def test_a_file_that_cannot_be_read_hides_no_damage_of_other_versions(
    store: Store, version: Version, base: Base, new_folder: Callable[[int], Path], tmp_path: Path
) -> None:
    other = store.publish(new_folder(1), task="summarize", base=base)
    blob = _blob(tmp_path, store, version, "adapter_model.safetensors")
    blob.unlink()
    blob.symlink_to("/proc/self/mem")  # A regular file whose first byte cannot be read: an I/O error on demand.
    _flip_byte(_blob(tmp_path, store, other, "adapter_model.safetensors"))
    damage = store.find_damage()
    assert list(damage) == ["summarize@v1", "summarize@v2"]
    assert damage["summarize@v1"].what == "summarize@v1 cannot be checked: [Errno 5] Input/output error."
    assert damage["summarize@v1"].hint == (
        "Check the disk and permissions, import the same adapter again, or restore the store from a backup."
    )
    with pytest.raises(JobFailedError, match=r"cannot use a file: .*Input/output error"):
        store.view(version.serving_digest)


def test_a_view_is_built_without_hard_links_too(
    store: Store, base: Base, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = store.publish(folder, task="summarize", base=base)
    view = store.view(version.serving_digest)
    (view / "adapterhub.json").unlink()

    def no_links(*_paths: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    assert store.view(version.serving_digest) == view
    assert (view / "adapter_model.safetensors").stat().st_nlink == 1
    store.verify("summarize")


@pytest.mark.usefixtures("version")
def test_a_version_that_stricter_checks_refuse_is_reported(store: Store, tmp_path: Path) -> None:
    assert store.find_damage() == {}
    with Store.open(tmp_path / "store", limits=Limits(config_bytes=10)) as strict:
        damage = strict.find_damage()
    assert damage["summarize@v1"].what.startswith("summarize@v1 cannot be checked: ")
    assert damage["summarize@v1"].what.endswith(" bytes; allowed: 10.")


def test_opening_removes_scratch_older_than_a_day_only(tmp_path: Path) -> None:
    Store.open(tmp_path / "store").close()
    old, young = tmp_path / "store" / "tmp" / "old", tmp_path / "store" / "tmp" / "young"
    for path in (old, young):
        path.mkdir()
        (path / "x").write_bytes(b"x")
    os.utime(old, (time.time() - 25 * 3600,) * 2)
    Store.open(tmp_path / "store").close()
    assert (old.exists(), young.exists()) == (False, True)


def test_a_catalogue_of_a_newer_release_is_refused(tmp_path: Path) -> None:
    Store.open(tmp_path / "store").close()
    with closing(sqlite3.connect(tmp_path / "store" / "catalogue.sqlite")) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(UserInputError, match=r"has schema 99; allowed: 1. Upgrade AdapterHub"):
        Store.open(tmp_path / "store")


def test_a_catalogue_that_is_no_database_is_reported(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "catalogue.sqlite").write_bytes(b"x" * 4096)
    with pytest.raises(StoreCorruptError, match=r"is damaged: file is not a database. Restore it from a backup."):
        Store.open(tmp_path / "store")


def test_a_store_that_cannot_be_created_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(JobFailedError, match=r"Cannot create the store in .*: Not a directory. Set ADAPTERHUB_HOME"):
        Store.open(tmp_path / "file" / "store")


def test_a_catalogue_that_stays_locked_is_reported(
    base: Base, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue_module, "_BUSY_TIMEOUT_MS", 50)
    with (
        Store.open(tmp_path / "store") as store,
        closing(sqlite3.connect(tmp_path / "store" / "catalogue.sqlite", isolation_level=None)) as other,
    ):
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(OverloadedError, match=r"stayed locked for .* s. Try again; if it stays so"):
            store.publish(folder, task="summarize", base=base)
        assert store.versions() == []  # Readers are not blocked.


def test_a_lost_table_is_reported(store: Store, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "store" / "catalogue.sqlite")) as connection:
        connection.execute("DROP TABLE aliases")
    with pytest.raises(JobFailedError, match=r"failed: no such table: aliases. Check free space and permissions"):
        store.aliases()
