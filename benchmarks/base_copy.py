"""The base that every benchmark uses, and float32 copies of exactly the values it computes with, for the peers.

Our systems serve the base as `hub serve` does, in `QUANTIZATION`. On a CPU peers have no 4-bit product that gives these
values, so they read them dequantized to float32: safetensors for transformers, PEFT and vLLM, GGUF
for llama.cpp. What is made for a base lies in a folder named after its digest, so it never serves another base.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from adapterhub.base.catalogue import pull_base
from adapterhub.base.identity import Base, describe_base
from adapterhub.base.loading import load_model, load_tokenizer
from adapterhub.errors import UserInputError
from adapterhub.settings import Quantization, Settings

__all__ = ["QUANTIZATION", "base_cache", "benchmark_base", "write_copy", "write_gguf"]

QUANTIZATION: Quantization = "nf4"  # The product's default, whatever the settings of this machine say.
_DIGEST_CHARS = 16
_GGUF_FLOAT32 = 0  # LLAMA_FTYPE_ALL_F32
_GGUF_FAMILY = "llama"  # Other families name and order their rows in other ways.


def benchmark_base(settings: Settings) -> Base:
    """Return the configured base in the quantization of all benchmarks, fetched unless it is there."""
    pulled = pull_base(None, settings)
    return describe_base(pulled.name, pulled.folder, QUANTIZATION)


def base_cache(base: Base, cache: Path) -> Path:
    """Return the folder of everything in the cache that fits this base only."""
    return cache / "bases" / base.digest[:_DIGEST_CHARS]


def write_copy(base: Base, cache: Path) -> Path:
    """Write the base's values as float32 safetensors with its tokenizer unless they are there; return the folder.

    The folder appears whole or not at all.
    """
    target = base_cache(base, cache) / "float32"
    if not target.is_dir():
        scratch = target.with_name(f".{target.name}.tmp")
        shutil.rmtree(scratch, ignore_errors=True)
        load_model(base).save_pretrained(scratch)
        load_tokenizer(base).save_pretrained(scratch)
        scratch.replace(target)
    return target


def write_gguf(base: Base, cache: Path, *, original: Path) -> Path:
    """Write the base's values as a float32 GGUF file unless it is there, and return it.

    original: a GGUF file of the same base, whose settings and tokenizer are kept; its weights are replaced by name.
    Raises UserInputError for a file of another family, and for a tensor that the base does not have.
    """
    target = base_cache(base, cache) / "float32.gguf"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = target.with_suffix(".tmp")
        _replace_weights(original, load_model(base), scratch)
        scratch.replace(target)
    return target


def _replace_weights(original: Path, model: Any, target: Path) -> None:
    import gguf

    reader = gguf.GGUFReader(original)
    family = reader.fields[gguf.Keys.General.ARCHITECTURE].contents()
    if family != _GGUF_FAMILY:
        raise UserInputError(
            f"{str(original)!r} is of the family {family!r}, not {_GGUF_FAMILY!r}.",
            "Leave llama.cpp out with --systems.",
        )
    text = model.config.get_text_config()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, text.num_hidden_layers)
    values: dict[str, Any] = {
        name: value
        for key, value in model.state_dict().items()
        if (name := names.get_name(key, try_suffixes=(".weight", ".bias"))) is not None
    }
    writer = gguf.GGUFWriter(target, _GGUF_FAMILY)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == gguf.Keys.General.ARCHITECTURE:
            continue  # The writer's own.
        value = _GGUF_FLOAT32 if field.name == gguf.Keys.General.FILE_TYPE else field.contents()
        writer.add_key_value(field.name, value, field.types[0], sub_type=field.types[-1])
    for tensor in reader.tensors:
        if tensor.name not in values:
            raise UserInputError(
                f"{str(original)!r} holds a tensor {tensor.name!r} that the base does not have.",
                "Leave llama.cpp out with --systems.",
            )
        value = values[tensor.name].numpy()
        if ".attn_q." in tensor.name:
            value = _paired(value, text.num_attention_heads)
        if ".attn_k." in tensor.name:
            value = _paired(value, text.num_key_value_heads)
        writer.add_tensor(tensor.name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _paired(value: Any, num_heads: int) -> Any:
    """Put the rows that one rotation turns side by side: (O, H) or (O,), as llama.cpp wants queries and keys.

    Source: `LlamaModel.permute` in https://github.com/ggml-org/llama.cpp, convert_hf_to_gguf.py, MIT.
    """
    halves = value.reshape(num_heads, 2, value.shape[0] // num_heads // 2, *value.shape[1:])
    return halves.swapaxes(1, 2).reshape(value.shape)
