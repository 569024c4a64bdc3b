"""The store's public face: publish, look up, move aliases, verify, export."""

from __future__ import annotations

import errno
import hashlib
import logging
import shutil
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import ValidationError

from adapterhub.base import Base
from adapterhub.errors import AdapterConfigError, AdapterWeightsError, JobFailedError, StoreCorruptError, UserInputError
from adapterhub.records import EffectReport, EvaluationRecord, Manifest, TrainingRecord
from adapterhub.store.aliases import list_aliases, log_head, move_alias, read_log, verify_log
from adapterhub.store.canonical import canonical_json
from adapterhub.store.catalogue import Catalogue
from adapterhub.store.digests import serving_digest
from adapterhub.store.entries import Alias, LogEntry, Version
from adapterhub.store.files import Files
from adapterhub.store.names import DEFAULT_ALIAS, check_digest, check_task, check_text, parse_alias_label
from adapterhub.store.publish import (
    CONFIG_FILE,
    NOTE_FILE,
    WEIGHTS_FILE,
    OnStep,
    PublishStep,
    Staged,
    read_config,
    stage,
)
from adapterhub.store.versions import (
    find_by_manifest,
    insert_version,
    list_tasks,
    list_versions,
    resolve,
    resolve_in_task,
)
from adapterhub.store.weights import Limits, check_weights

__all__ = ["Store"]

_log = logging.getLogger(__name__)


def _no_step(_step: PublishStep) -> None:
    pass


class Store:
    """One store on a local disk. Safe for several threads and processes; open it anew in each process."""

    def __init__(self, files: Files, catalogue: Catalogue, limits: Limits) -> None:
        self._files = files
        self._catalogue = catalogue
        self._limits = limits

    @classmethod
    def open(cls, root: Path, *, limits: Limits | None = None) -> Self:
        """Open the store in `root`, creating what is missing and removing scratch folders older than a day."""
        files = Files(root)
        files.create()
        catalogue = Catalogue(root / "catalogue.sqlite")
        catalogue.create()
        return cls(files, catalogue, limits or Limits())

    def close(self) -> None:
        """Close the catalogue's connections."""
        self._catalogue.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def publish(
        self,
        folder: Path,
        *,
        task: str,
        base: Base,
        training: TrainingRecord | None = None,
        evaluation: EvaluationRecord | None = None,
        actor: str = "cli",
        trust_base: bool = False,
        on_step: OnStep | None = None,
    ) -> Version:
        """Publish a PEFT folder as the next version of `task`; equal content returns the version it already has.

        The first version of a task also gets the alias `stable`. trust_base: take `base` as the right one although the
        folder names another. on_step: called after each step, for progress.
        Raises what `stage` raises, InvalidNameError, and JobFailedError when the disk refuses.
        """
        check_task(task)
        check_text(actor, what="actor")
        report = on_step or _no_step
        with self._disk_errors_translated():
            staged = stage(
                self._files,
                folder,
                task=task,
                base=base,
                training=training,
                evaluation=evaluation,
                trust_base=trust_base,
                limits=self._limits,
                on_step=report,
            )
            version = self._commit(staged, actor=actor, on_step=report)
            report(PublishStep.COMMITTED)
            self.view(version.serving_digest)
            report(PublishStep.VIEWED)
        return version

    def _commit(self, staged: Staged, *, actor: str, on_step: OnStep) -> Version:
        """Insert the version: the only point at which it becomes visible."""
        with self._catalogue.write() as connection:
            known = find_by_manifest(connection, staged.manifest.task, staged.manifest_digest)
            if known is not None:
                return known
            version = insert_version(connection, staged.manifest, staged.manifest_digest)
            if version.number == 1:
                reason = "first version of the task"
                move_alias(
                    connection, version, name=DEFAULT_ALIAS, expected_generation=None, actor=actor, reason=reason
                )
            on_step(PublishStep.INSERTED)
        return version

    @contextmanager
    def _disk_errors_translated(self) -> Generator[None]:
        try:
            yield
        except OSError as exc:
            full = exc.errno in (errno.ENOSPC, errno.EDQUOT)
            raise JobFailedError(
                f"The store in {str(self._files.root)!r} cannot use a file: {exc}.",
                "Free some space and try again." if full else "Check its permissions and try again.",
            ) from exc

    def get_version(self, ref: str) -> Version:
        """Return the version that `task`, `task@v2`, `task@alias`, `task@sha256:...` or `sha256:...` names.

        A digest may be cut to 8 digits. Raises InvalidNameError, AdapterNotFoundError or AliasNotFoundError.
        """
        with self._catalogue.read() as connection:
            return resolve(connection, ref)

    def versions(self, task: str | None = None) -> list[Version]:
        """Versions of one task or of all, by task and number."""
        with self._catalogue.read() as connection:
            return list_versions(connection, task)

    def tasks(self) -> list[str]:
        """Tasks with at least one version."""
        with self._catalogue.read() as connection:
            return list_tasks(connection)

    def manifest(self, version: Version) -> Manifest:
        """Read a version's manifest and check it against its digest. Raises StoreCorruptError."""
        path = self._files.manifest_path(version.manifest_digest)
        what = f"The manifest of {version.label}"
        data = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(data).hexdigest() != version.manifest_digest:
            self._files.check(path, version.manifest_digest, what=what)
        try:
            manifest = Manifest.model_validate_json(data)
        except ValidationError as exc:
            raise StoreCorruptError(f"{what} does not parse: {exc.errors()[0]['msg']}.", "Upgrade AdapterHub.") from exc
        if (manifest.task, manifest.serving_digest) != (version.task, version.serving_digest):
            raise StoreCorruptError(
                f"{what} belongs to {manifest.task!r} sha256:{manifest.serving_digest[:12]}.",
                "The catalogue was changed; restore it from a backup.",
            )
        return manifest

    def view(self, digest: str) -> Path:
        """Return the folder in which PEFT can open the adapter with that serving digest.

        Its files are hashed first, and a damaged or missing view is built again. Raises StoreCorruptError when the
        blobs themselves are damaged, JobFailedError when the disk refuses, AdapterNotFoundError when nothing published
        has that digest.
        """
        version = self.get_version(f"sha256:{check_digest(digest)}")
        with self._disk_errors_translated():
            files = self.manifest(version).files
            return self._files.ensure_view(version.serving_digest, files, self._note(version))

    def _note(self, version: Version) -> bytes:
        note = {
            "task": version.task,
            "version": version.number,
            "serving_digest": version.serving_digest,
            "manifest_digest": version.manifest_digest,
            "base_digest": version.base_digest,
        }
        return canonical_json(note, what="note") + b"\n"

    def aliases(self, task: str | None = None) -> list[Alias]:
        """Aliases of one task or of all, by task and name."""
        with self._catalogue.read() as connection:
            return list_aliases(connection, task)

    def set_alias(
        self, task: str, name: str, version_ref: str, *, expected_generation: int | None, actor: str, reason: str
    ) -> Alias:
        """Point `task@name` to a version of the same task, if nobody moved it meanwhile.

        version_ref: a full reference, or its part after the `@`. expected_generation: the generation last seen, None to
        create the alias. Raises ConflictError with the current state.
        """
        with self._catalogue.write() as connection:
            version = resolve_in_task(connection, version_ref, task=check_task(task))
            return move_alias(
                connection, version, name=name, expected_generation=expected_generation, actor=actor, reason=reason
            )

    def point_alias(
        self, label: str, version_ref: str, *, generation: int | None = None, actor: str, reason: str
    ) -> Alias:
        """Point the alias written as `task@name` to a version, as people do it.

        generation: as in `set_alias`, but None moves the alias wherever it is now, and 0 means that it must not exist.
        """
        task, name = parse_alias_label(label)
        with self._catalogue.write() as connection:
            version = resolve_in_task(connection, version_ref, task=task)
            current = {alias.name: alias.generation for alias in list_aliases(connection, task)}.get(name)
            expected = current if generation is None else generation or None
            return move_alias(connection, version, name=name, expected_generation=expected, actor=actor, reason=reason)

    def log_head(self) -> int:
        """Row id of the newest alias-log row, 0 for none. Cheap: servers poll it to see whether an alias moved."""
        with self._catalogue.read() as connection:
            return log_head(connection)

    def log(self, task: str | None = None) -> list[LogEntry]:
        """Alias moves of one task or of all, oldest first."""
        with self._catalogue.read() as connection:
            return read_log(connection, task)

    def verify_log(self) -> int:
        """Check the whole hash chain and return its length. Raises StoreCorruptError naming the first bad row."""
        with self._catalogue.read() as connection:
            return verify_log(connection)

    def record_effect(self, digest: str, report: EffectReport) -> None:
        """Keep what a server measured of the adapter with that serving digest. Raises JobFailedError."""
        data = canonical_json(report.model_dump(mode="json"), what="effect report")
        with self._disk_errors_translated():
            self._files.replace(self._files.effect_path(digest), data)

    def find_effect(self, digest: str) -> EffectReport | None:
        """Return what was measured last, or None. Another release's report counts as none: measure again."""
        path = self._files.effect_path(digest)
        with self._disk_errors_translated():
            data = path.read_bytes() if path.is_file() else b""
        try:
            return EffectReport.model_validate_json(data) if data else None
        except ValidationError as exc:
            _log.warning("the effect report %s does not parse: %s", path, exc.errors()[0]["msg"])
            return None

    def verify(self, ref: str) -> None:
        """Hash every file of a version again and derive its serving digest anew. Raises StoreCorruptError."""
        version = self.get_version(ref)
        try:
            self._verify_files(version)
        except (OSError, AdapterConfigError, AdapterWeightsError) as exc:  # The last two: checks grew since it came.
            fault = f"{exc}." if isinstance(exc, OSError) else exc.what
            raise StoreCorruptError(
                f"{version.label} cannot be checked: {fault}",
                "Check the disk and permissions, import the same adapter again, or restore the store from a backup.",
            ) from exc

    def _verify_files(self, version: Version) -> None:
        manifest = self.manifest(version)
        for name, digest in manifest.files.items():
            what = f"File {name!r} of {version.label}"
            self._files.check(self._files.blob_path(digest), digest, what=what)
        tensors = check_weights(self._files.blob_path(manifest.files[WEIGHTS_FILE]), limits=self._limits)
        config = read_config(self._files.blob_path(manifest.files[CONFIG_FILE]), limits=self._limits)
        derived = serving_digest(tensors, config=config, base_digest=version.base_digest)
        if derived != version.serving_digest:
            raise StoreCorruptError(
                f"The files of {version.label} give sha256:{derived[:12]}, not sha256:{version.serving_digest[:12]}.",
                "The catalogue was changed; restore it from a backup.",
            )
        self._verify_view(version, manifest)

    def find_damage(self, refs: Sequence[str] | None = None) -> dict[str, StoreCorruptError]:
        """Verify several versions, all of them for None, and return {reference: what is wrong} for the damaged ones."""
        damaged: dict[str, StoreCorruptError] = {}
        for ref in refs or [version.label for version in self.versions()]:
            try:
                self.verify(ref)
            except StoreCorruptError as error:
                damaged[ref] = error
        return damaged

    def _verify_view(self, version: Version, manifest: Manifest) -> None:
        view = self._files.view_path(version.serving_digest)
        if view.is_dir():
            first = self.get_version(f"sha256:{version.serving_digest}")
            files = (self.manifest(first) if first != version else manifest).files
            note_digest = hashlib.sha256(self._note(first)).hexdigest()
            for name, digest in (files | {NOTE_FILE: note_digest}).items():
                self._files.check(view / name, digest, what=f"File {name!r} in the view of {version.label}")

    def export(self, ref: str, folder: Path) -> Path:
        """Copy a version into a new PEFT folder and return it. Raises UserInputError when the folder is not empty."""
        version = self.get_version(ref)
        self.verify(ref)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserInputError(f"{str(folder)!r} exists and is not an empty folder.", "Name a new folder.")
        with self._disk_errors_translated():
            folder.mkdir(parents=True, exist_ok=True)
            for name, digest in self.manifest(version).files.items():
                shutil.copyfile(self._files.blob_path(digest), folder / name)
            (folder / NOTE_FILE).write_bytes(self._note(version))
        return folder
