"""What a run was made of: code, packages, machine, data. Enough to repeat it from `run.json`."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch

from adapterhub import __version__
from adapterhub.recipes import Recipe
from adapterhub.records import TrainingRecord
from trainer.data.prepare import PreparedData
from trainer.data.tokens import TokenRow, rows_digest
from trainer.loop import TrainingResult

__all__ = ["code_revision", "hardware", "package_versions", "training_record"]

_PACKAGES = ("accelerate", "bitsandbytes", "peft", "safetensors", "tokenizers", "torch", "transformers", "trl")


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def code_revision() -> str:
    """The git revision, with `-dirty` when tracked files were changed; the package version outside a checkout."""
    # An installed copy may lie inside somebody else's repository; only a tracked file proves that it is ours.
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return f"adapterhub-{__version__}"
    revision = _git("rev-parse", "HEAD") or "unknown"
    return revision + ("-dirty" if _git("status", "--porcelain", "--untracked-files=no") else "")


def package_versions() -> dict[str, str]:
    """Versions of everything that takes part in the arithmetic."""
    return {
        "adapterhub": __version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in _PACKAGES},
    }


def hardware() -> dict[str, str]:
    """The machine as far as it can change results or speed; threads are part of the sums' order."""
    return {
        "machine": platform.machine(),
        "processor": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "num_cpus": str(os.cpu_count()),
        "num_threads": str(torch.get_num_threads()),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def training_record(
    recipe: Recipe, data: PreparedData, rows: Sequence[TokenRow], result: TrainingResult
) -> TrainingRecord:
    """Put together what the manifest says about the run."""
    return TrainingRecord(
        code_revision=code_revision(),
        recipe=recipe.model_dump(mode="json"),
        data_digests=data.digests,
        token_digest=rows_digest(rows),
        seed=recipe.training.seed,
        packages=package_versions(),
        hardware=hardware(),
        wall_time_s=round(result.wall_time_s, 3),
        num_train_tokens=result.num_train_tokens,
        num_trainable_parameters=result.num_trainable_parameters,
        metrics=result.metrics,
        parents=(),
    )
