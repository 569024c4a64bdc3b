"""What a base model is: files, quantization, tokenizer and chat template, condensed into `base_digest`.

Knows files and their hashes. Does not load weights; see `loading.py` for that.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from adapterhub.digests import file_sha256
from adapterhub.errors import BaseNotPulledError, UserInputError
from adapterhub.records import BaseRecord
from adapterhub.settings import Quantization

__all__ = ["Base", "describe_base"]

_QUANTIZATION_RECIPES: dict[Quantization, dict[str, Any]] = {
    # https://arxiv.org/abs/2305.14314, section 3: 4-bit NormalFloat, double quantization; 64 weights per block.
    "nf4": {"type": "nf4", "double_quant": True, "block_size": 64},
    # https://arxiv.org/abs/2208.07339: vector-wise int8; we keep the rounded weights and multiply in floating point.
    "int8": {"type": "int8", "axis": "row"},
    "none": {"type": "none"},
}
# Every file from which a tokenizer of transformers is built: fast, SentencePiece, byte-pair, word-piece and tiktoken.
_TOKENIZER_PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "normalizer.json",
    "tekken.json",
    "bpe.codes",
    "*.model",
    "*.spm",
    "*.tiktoken",
)
# Keys that name the writer of a configuration file, or the circumstances of writing, not the model.
_PASSING_CONFIG_KEYS = frozenset(
    {
        "_name_or_path",
        "dtype",
        "is_local",
        "local_files_only",
        "name_or_path",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
_MAX_HEADER_BYTES = 100 << 20  # The limit of the safetensors library.
_IDENTITY_CACHE = ".adapterhub-files.json"


@dataclass(frozen=True, slots=True)
class Base:
    """One frozen base model on this machine.

    modules: full module name -> (out_features, in_features) of every linear an adapter may target; embeddings and the
    output head are not among them.
    """

    name: str
    folder: Path
    quantization: Quantization
    digest: str
    chat_template_digest: str
    context_tokens: int
    modules: Mapping[str, tuple[int, int]] = field(repr=False)

    def record(self) -> BaseRecord:
        """What a manifest stores about this base."""
        return BaseRecord(
            name=self.name,
            digest=self.digest,
            quantization=self.quantization,
            chat_template_digest=self.chat_template_digest,
        )


def _weight_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserInputError(
            f"The base folder {str(folder)!r} holds no *.safetensors file.",
            "Name a folder in Hugging Face layout; convert pickle checkpoints (*.bin, *.pt) with `safetensors` first.",
        )
    return files


def _cached_digests(folder: Path, files: list[Path]) -> dict[str, str]:
    """sha256 of each file, remembered beside the weights while size and change time stay the same."""
    cache_path = folder / _IDENTITY_CACHE
    try:
        cache = json.loads(cache_path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        cache = {}
    result: dict[str, str] = {}
    fresh: dict[str, list[Any]] = {}
    for path in files:
        stat = path.stat()
        known = cache.get(path.name)
        stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        digest = known[3] if isinstance(known, list) and known[:3] == stamp else file_sha256(path)
        result[path.name] = digest
        fresh[path.name] = [*stamp, digest]
    if fresh != cache:
        with contextlib.suppress(OSError):  # A read-only base folder costs a hash at each start, nothing else.
            cache_path.write_text(json.dumps(fresh), encoding="utf-8")
    return result


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as exc:
        raise UserInputError(f"{path} is not valid JSON: {exc}.", "Copy or pull the base again.") from exc
    if not isinstance(content, dict):
        raise UserInputError(f"{path} holds no JSON object.", "Copy or pull the base again.")
    return cast("dict[str, Any]", content)


def _header(path: Path) -> dict[str, Any]:
    """Read the header of a safetensors file; its size is checked before memory is taken for it."""
    with path.open("rb") as file:
        size_bytes = int.from_bytes(file.read(8), "little")
        if not 2 <= size_bytes <= min(_MAX_HEADER_BYTES, path.stat().st_size - 8):
            raise UserInputError(
                f"{path} is no safetensors file: its header would have {size_bytes} bytes.",
                "If it is a git-LFS pointer, fetch the real file; else copy or pull the base again.",
            )
        try:
            return json.loads(file.read(size_bytes))
        except ValueError as exc:
            raise UserInputError(
                f"{path} is no safetensors file: its header is not JSON.", "Copy or pull the base again."
            ) from exc


def _linear_modules(files: list[Path]) -> dict[str, tuple[int, int]]:
    modules: dict[str, tuple[int, int]] = {}
    for path in files:
        for name, entry in _header(path).items():
            is_matrix = name.endswith(".weight") and len(entry.get("shape", ())) == 2
            if is_matrix and "embed" not in name and not name.startswith("lm_head"):
                modules[name.removesuffix(".weight")] = (entry["shape"][0], entry["shape"][1])
    return dict(sorted(modules.items()))


def _chat_template(folder: Path) -> str:
    template = folder / "chat_template.jinja"
    if template.is_file():
        return template.read_text(encoding="utf-8")
    config = folder / "tokenizer_config.json"
    found = _read_json(config).get("chat_template") if config.is_file() else None
    return found if isinstance(found, str) else json.dumps(found) if found else ""


def _lasting(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _PASSING_CONFIG_KEYS}


def _tokenizer_digest(path: Path) -> str:
    if path.name != "tokenizer_config.json":
        return file_sha256(path)
    config = _read_json(path)
    return hashlib.sha256(json.dumps(_lasting(config), sort_keys=True).encode()).hexdigest()


def describe_base(name: str, folder: Path, quantization: Quantization) -> Base:
    """Read the identity of the base in `folder`. Raises BaseNotPulledError when the folder is missing."""
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise BaseNotPulledError(f"Base {name!r} is not on this machine ({folder}).", f"Run `hub base pull {name}`.")
    config = _read_json(config_path)
    weights = _weight_files(folder)
    tokenizer = {path for pattern in _TOKENIZER_PATTERNS for path in folder.glob(pattern) if path.is_file()}
    template_digest = hashlib.sha256(_chat_template(folder).encode()).hexdigest()
    identity = {
        "config": _lasting(config),
        "weights": _cached_digests(folder, weights),
        "tokenizer": {path.name: _tokenizer_digest(path) for path in sorted(tokenizer)},
        "chat_template": template_digest,
        "quantization": _QUANTIZATION_RECIPES[quantization],
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    text_config = config.get("text_config", config)
    return Base(
        name=name,
        folder=folder,
        quantization=quantization,
        digest=digest,
        chat_template_digest=template_digest,
        context_tokens=int(text_config.get("max_position_embeddings", 2048)),
        modules=_linear_modules(weights),
    )
