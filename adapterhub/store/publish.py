"""Bring an adapter folder into the store: copy, check, link. The catalogue then makes it visible in one transaction.

Until that transaction, everything written here is unreferenced; a process killed at any point leaves all or nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, cast

from adapterhub.base import Base
from adapterhub.errors import AdapterConfigError, AdapterWeightsError, BaseMismatchError
from adapterhub.peft_format import AdapterConfig, TensorInfo, map_tensors, parse_adapter_config
from adapterhub.records import EvaluationRecord, Manifest, TensorRecord, TrainingRecord
from adapterhub.store.canonical import canonical_json, strict_json
from adapterhub.store.digests import serving_digest
from adapterhub.store.files import Files
from adapterhub.store.weights import CheckedTensor, Limits, check_weights

__all__ = ["CONFIG_FILE", "NOTE_FILE", "WEIGHTS_FILE", "OnStep", "PublishStep", "Staged", "read_config", "stage"]

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
NOTE_FILE = "adapterhub.json"

_PICKLE_SUFFIXES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}


class PublishStep(StrEnum):
    """What `publish` has just done, in this order."""

    COPIED = "copied"
    CHECKED = "checked"
    WEIGHTS_STORED = "weights_stored"
    CONFIG_STORED = "config_stored"
    MANIFEST_STORED = "manifest_stored"
    INSERTED = "inserted"  # Not visible yet.
    COMMITTED = "committed"
    VIEWED = "viewed"


OnStep = Callable[[PublishStep], None]


@dataclass(frozen=True, slots=True)
class Staged:
    """A manifest whose files are all in place, but which no version names yet."""

    manifest: Manifest
    manifest_digest: str


def stage(
    files: Files,
    folder: Path,
    *,
    task: str,
    base: Base,
    training: TrainingRecord | None,
    evaluation: EvaluationRecord | None,
    trust_base: bool,
    limits: Limits,
    on_step: OnStep,
) -> Staged:
    """Check a PEFT folder and put its files and its manifest in place.

    trust_base: do not compare the name of the base in `adapter_config.json` with `base`.
    Raises AdapterConfigError, AdapterWeightsError, AdapterMismatchError or BaseMismatchError; nothing that failed a
    check is kept.
    """
    _check_names(folder)
    raw = _read_object(folder / CONFIG_FILE, limits)
    config = parse_adapter_config(raw)
    if (folder / NOTE_FILE).is_file():
        _check_note(folder / NOTE_FILE, base, limits)
    elif not trust_base:
        _check_stated_base(raw.get("base_model_name_or_path"), base)
    with files.scratch() as scratch:
        weights = scratch / WEIGHTS_FILE
        weights_digest = files.copy_in(folder / WEIGHTS_FILE, weights, max_bytes=limits.file_bytes)
        on_step(PublishStep.COPIED)
        tensors = check_weights(weights, limits=limits)  # The copy, which nobody else can change any more.
        map_tensors(config, {t.name: TensorInfo(t.dtype, t.shape) for t in tensors}, base.modules)
        on_step(PublishStep.CHECKED)
        files.add_blob(weights, weights_digest)
        on_step(PublishStep.WEIGHTS_STORED)
        config_bytes = (json.dumps(config.to_peft(), indent=2) + "\n").encode()  # Unsorted: the first pattern wins.
        config_digest = files.write_scratch(scratch / CONFIG_FILE, config_bytes)
        files.add_blob(scratch / CONFIG_FILE, config_digest)
        on_step(PublishStep.CONFIG_STORED)
        manifest = _build_manifest(
            config, tensors, {WEIGHTS_FILE: weights_digest, CONFIG_FILE: config_digest}, task=task, base=base
        ).model_copy(update={"training": training, "evaluation": evaluation})
        manifest_bytes = canonical_json(manifest.model_dump(), what="manifest")
        manifest_digest = files.write_scratch(scratch / "manifest.json", manifest_bytes)
        files.add_manifest(scratch / "manifest.json", manifest_digest)
        on_step(PublishStep.MANIFEST_STORED)
    return Staged(manifest, manifest_digest)


def _build_manifest(
    config: AdapterConfig, tensors: tuple[CheckedTensor, ...], files: dict[str, str], *, task: str, base: Base
) -> Manifest:
    targets = config.target_modules
    return Manifest(
        task=task,
        method=config.method,
        rank=config.rank,
        alpha=config.alpha,
        target_modules=(targets,) if isinstance(targets, str) else targets,
        serving_digest=serving_digest(tensors, config=config, base_digest=base.digest),
        base=base.record(),
        files=files,
        config=config.canonical(),
        tensors=tuple(TensorRecord(name=t.name, dtype=t.dtype, shape=t.shape) for t in tensors),
    )


def _check_names(folder: Path) -> None:
    """Refuse pickles by name, whatever they are for, and folders that hold no adapter."""
    if not folder.is_dir():
        raise AdapterConfigError(f"{str(folder)!r} is not a folder.", "Name the folder PEFT's `save_pretrained` wrote.")
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in _PICKLE_SUFFIXES)
    if pickles:
        raise AdapterWeightsError(
            f"{str(folder)!r} holds pickle files, which can run any code when loaded: {', '.join(pickles)}.",
            "Save the weights as safetensors with PEFT's `save_pretrained` and delete these files.",
        )
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]
    if missing:
        raise AdapterConfigError(
            f"{str(folder)!r} is no PEFT adapter folder: it lacks {' and '.join(missing)}.",
            "Name the folder PEFT's `save_pretrained` wrote.",
        )


def _read_object(path: Path, limits: Limits) -> Mapping[str, Any]:
    size_bytes = path.stat().st_size
    if size_bytes > limits.config_bytes:
        raise AdapterConfigError(
            f"{path.name} has {size_bytes:,} bytes; allowed: {limits.config_bytes:,}.",
            "Save the adapter again with PEFT.",
        )
    try:
        value = strict_json(path.read_bytes())
    except ValueError as exc:
        raise AdapterConfigError(f"{path.name} is not valid JSON: {exc}.", "Save the adapter again with PEFT.") from exc
    if not isinstance(value, dict):
        raise AdapterConfigError(f"{path.name} holds no JSON object.", "Save the adapter again with PEFT.")
    return cast("Mapping[str, Any]", value)


def read_config(path: Path, *, limits: Limits) -> AdapterConfig:
    """Parse an `adapter_config.json`. Raises AdapterConfigError."""
    return parse_adapter_config(_read_object(path, limits))


def _check_note(path: Path, base: Base, limits: Limits) -> None:
    """Compare with the base digest that exports and training runs write beside the adapter."""
    made_for = str(_read_object(path, limits).get("base_digest"))
    if made_for != base.digest:
        raise BaseMismatchError(
            f"The adapter was made for base sha256:{made_for[:12]}, not for {base.name!r} with quantization "
            f"{base.quantization!r} (sha256:{base.digest[:12]}).",
            "Name the right base with `--base` and `--quantization`, or train again on this one.",
        )


def _check_stated_base(stated: object, base: Base) -> None:
    """Compare the last part of the hub id or path that PEFT wrote with the base; organisations and folders differ."""
    if not stated:
        return
    if _last_part(str(stated)) not in (_last_part(base.name), _last_part(base.folder.name)):
        shown = repr(stated) if len(repr(stated)) <= 120 else f"{repr(stated)[:117]}..."
        raise BaseMismatchError(
            f"adapter_config.json says the adapter was made for {shown}, not for {base.name!r}.",
            "Name the right base with `--base`, or add `--trust-base` when both are the same model.",
        )


def _last_part(name: str) -> str:
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2].casefold()
