"""Content-addressed files on one local file system: blobs, manifests, views, scratch folders and quarantine.

Knows digests and bytes. Does not know tasks, versions or SQL. Every path is made of a checked digest.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
import uuid
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from adapterhub.digests import file_sha256
from adapterhub.errors import AdapterWeightsError, JobFailedError, StoreCorruptError
from adapterhub.store.names import check_digest

__all__ = ["Files", "fsync_folder"]

_log = logging.getLogger(__name__)
_READ_ONLY = 0o444
_CHUNK_BYTES = 1 << 20
_SCRATCH_MAX_AGE_S = 24 * 3600  # A publish takes seconds; what is a day old was left by a killed process.


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Files:
    """The folders of one store. Safe for several threads and processes: files appear complete, by link or rename."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._scratch = root / "tmp"
        self._quarantine = root / "quarantine"
        self._views = root / "views"

    def create(self) -> None:
        """Make the folders and remove scratch folders older than a day. Raises JobFailedError when not writable."""
        try:
            for name in ("blobs/sha256", "manifests/sha256", "views", "effects", "tmp", "quarantine"):
                (self.root / name).mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise JobFailedError(
                f"Cannot create the store in {str(self.root)!r}: {exc.strerror}.",
                "Set ADAPTERHUB_HOME to a writable folder on a local disk.",
            ) from exc
        oldest = time.time() - _SCRATCH_MAX_AGE_S
        for path in self._scratch.iterdir():
            with suppress(FileNotFoundError):  # Its owner has just finished.
                if path.stat().st_mtime < oldest:
                    shutil.rmtree(path, ignore_errors=True)

    @contextmanager
    def scratch(self) -> Generator[Path]:
        """A private folder on the same file system, removed at the end."""
        folder = self._scratch / uuid.uuid4().hex
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def blob_path(self, digest: str) -> Path:
        """Where the blob with that sha256 lies."""
        return self._addressed("blobs", digest)

    def manifest_path(self, digest: str) -> Path:
        """Where the manifest with that sha256 lies."""
        return self._addressed("manifests", digest)

    def view_path(self, serving_digest: str) -> Path:
        """Folder in which PEFT finds the adapter."""
        return self._views / check_digest(serving_digest)

    def effect_path(self, serving_digest: str) -> Path:
        """File of what a server measured of the adapter; not part of what was published."""
        return self.root / "effects" / f"{check_digest(serving_digest)}.json"

    def _addressed(self, kind: str, digest: str) -> Path:
        return self.root / kind / "sha256" / check_digest(digest)[:2] / digest

    def copy_in(self, source: Path, target: Path, *, max_bytes: int) -> str:
        """Copy while hashing, make it durable and return its sha256. Raises AdapterWeightsError past `max_bytes`."""
        digest = hashlib.sha256()
        size_bytes = 0
        with source.open("rb") as reader, target.open("xb") as writer:
            while chunk := reader.read(_CHUNK_BYTES):
                size_bytes += len(chunk)
                if size_bytes > max_bytes:
                    raise AdapterWeightsError(f"{source.name!r} has more than {max_bytes:,} bytes.", "Lower the rank.")
                digest.update(chunk)
                writer.write(chunk)
            writer.flush()
            os.fsync(writer.fileno())
        return digest.hexdigest()

    def write_scratch(self, target: Path, data: bytes) -> str:
        """Write a scratch file, make it durable and return its sha256."""
        with target.open("xb") as writer:
            writer.write(data)
            writer.flush()
            os.fsync(writer.fileno())
        return hashlib.sha256(data).hexdigest()

    def replace(self, target: Path, data: bytes) -> None:
        """Write a file that may change; readers see the old bytes or the new ones."""
        with self.scratch() as scratch:
            self.write_scratch(scratch / target.name, data)
            (scratch / target.name).replace(target)
        fsync_folder(target.parent)

    def add_blob(self, scratch_file: Path, digest: str) -> None:
        """Link a scratch file into the blobs."""
        self._link(scratch_file, self.blob_path(digest), digest)

    def add_manifest(self, scratch_file: Path, digest: str) -> None:
        """Link a scratch file into the manifests."""
        self._link(scratch_file, self.manifest_path(digest), digest)

    def _link(self, scratch_file: Path, target: Path, digest: str) -> None:
        """Put a file in place under its digest. A damaged file already there goes to quarantine and is replaced."""
        scratch_file.chmod(_READ_ONLY)
        if not target.parent.is_dir():
            target.parent.mkdir(exist_ok=True)
            fsync_folder(target.parent.parent)
        try:
            os.link(scratch_file, target)
        except FileExistsError:
            if file_sha256(target) != digest:
                self._to_quarantine(target)
                self._link(scratch_file, target, digest)
                return
        fsync_folder(target.parent)

    def _to_quarantine(self, path: Path) -> None:
        _log.warning("%s differs from its digest; moved to %s", path, self._quarantine)
        with suppress(FileNotFoundError):  # Another writer saw it too.
            path.rename(self._quarantine / f"{path.name}.{uuid.uuid4().hex}")

    def check(self, path: Path, digest: str, *, what: str) -> None:
        """Hash a stored file. Raises StoreCorruptError naming `what` when it is missing or has other bytes."""
        if not path.is_file():
            fault = "is missing"
        elif file_sha256(path) != digest:
            fault = "has other bytes than were published"
        else:
            return
        raise StoreCorruptError(
            f"{what} (sha256:{digest[:12]}) {fault}: {path}.",
            "Import the same adapter again to repair it, or restore the store from a backup.",
        )

    def ensure_view(self, serving_digest: str, blobs: Mapping[str, str], note: bytes) -> Path:
        """Return the folder PEFT opens, building it where it is missing or damaged.

        blobs: file name -> sha256; each is hashed first. note: content of `adapterhub.json`.
        """
        for name, digest in blobs.items():
            self.check(self.blob_path(digest), digest, what=f"Blob {name!r}")
        view = self.view_path(serving_digest)
        if view.is_dir():
            if self._is_intact(view, blobs, note):
                return view
            self._to_quarantine(view)
        with self.scratch() as scratch:
            staged = scratch / "view"
            staged.mkdir()
            for name, digest in blobs.items():
                self._place(self.blob_path(digest), staged / name)
            self.write_scratch(staged / "adapterhub.json", note)
            (staged / "adapterhub.json").chmod(_READ_ONLY)
            fsync_folder(staged)
            try:
                staged.rename(view)
            except OSError:  # Another writer was first; whatever the reason, the view must be there and intact.
                if not self._is_intact(view, blobs, note):
                    raise
        fsync_folder(self._views)
        return view

    def _is_intact(self, view: Path, blobs: Mapping[str, str], note: bytes) -> bool:
        try:
            is_noted = (view / "adapterhub.json").read_bytes() == note
        except OSError:
            return False
        return is_noted and all(self._is_same(view / name, digest) for name, digest in blobs.items())

    def _is_same(self, path: Path, digest: str) -> bool:
        try:  # A link to the blob, which was hashed already, needs no second reading.
            return path.samefile(self.blob_path(digest)) or file_sha256(path) == digest
        except OSError:
            return False

    def _place(self, blob: Path, target: Path) -> None:
        try:
            os.link(blob, target)
        except OSError:  # No hard links here, or too many of them.
            shutil.copyfile(blob, target)
            target.chmod(_READ_ONLY)
