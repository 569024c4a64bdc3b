"""Check a safetensors file before anything loads it: its header, byte for byte, then every value for NaN and infinity.

Knows bytes. Does not know which tensors an adapter needs; `adapterhub.peft_format.map_tensors` does.
Source of the format: https://github.com/huggingface/safetensors (README, section "Format"). A loader and a checker that
read the header differently see different tensors, so what is ambiguous there is refused here.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn, cast

import numpy as np

from adapterhub.errors import AdapterWeightsError
from adapterhub.store.canonical import strict_json

__all__ = ["CheckedTensor", "Limits", "check_weights"]

_LENGTH_BYTES = 8  # The file starts with the header's length, little-endian.
_CHUNK_BYTES = 1 << 20
_MAX_NAME_CHARS = 512
_MAX_DIMENSIONS = 4  # Adapter tensors have one or two.
# dtype -> (bytes per value, unsigned integer type of that width, exponent bits: all set means NaN or infinity)
_DTYPES: dict[str, tuple[int, str, int]] = {
    "BF16": (2, "<u2", 0x7F80),
    "F16": (2, "<u2", 0x7C00),
    "F32": (4, "<u4", 0x7F800000),
}


@dataclass(frozen=True, slots=True)
class Limits:
    """What a file may ask for before it is refused.

    The default leaves room for rank 256 on every linear of a 70-billion-parameter model, and for adapters on mixtures
    of experts, whose headers hold tens of thousands of names.
    """

    file_bytes: int = 8 << 30
    header_bytes: int = 16 << 20
    config_bytes: int = 8 << 20
    num_tensors: int = 65_536


@dataclass(frozen=True, slots=True)
class CheckedTensor:
    """One tensor whose values are finite. sha256 covers its bytes alone, wherever they lie in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str


@dataclass(frozen=True, slots=True)
class _Span:
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def _refuse(what: str, hint: str = "The file is damaged or forged; save the adapter again with PEFT.") -> NoReturn:
    raise AdapterWeightsError(what, hint)


def check_weights(path: Path, *, limits: Limits) -> tuple[CheckedTensor, ...]:
    """Check the whole file and return its tensors, sorted by name. Raises AdapterWeightsError naming the fault."""
    with path.open("rb") as file:
        size_bytes = path.stat().st_size
        spans, data_start = _read_header(file, size_bytes, limits)
        file.seek(data_start)
        return tuple(sorted((_check_values(file, span) for span in spans), key=lambda tensor: tensor.name))


def _read_header(file: BinaryIO, size_bytes: int, limits: Limits) -> tuple[list[_Span], int]:
    """Return the spans in file order, which cover the data without overlap or hole, and where the data starts."""
    if size_bytes > limits.file_bytes:
        _refuse(f"The weight file has {size_bytes:,} bytes; allowed: {limits.file_bytes:,}.", "Lower the rank.")
    if size_bytes < _LENGTH_BYTES:
        _refuse(f"The weight file has {size_bytes} bytes; a safetensors file has at least {_LENGTH_BYTES}.")
    header_bytes = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    if header_bytes > limits.header_bytes:
        _refuse(f"The weight file states a header of {header_bytes:,} bytes; allowed: {limits.header_bytes:,}.")
    data_start = _LENGTH_BYTES + header_bytes
    if data_start > size_bytes:
        _refuse(f"The weight file states a header of {header_bytes:,} bytes but has {size_bytes:,} bytes in all.")
    raw = file.read(header_bytes)
    if not raw.startswith(b"{"):
        _refuse(f"The header starts with {raw[:1]!r} instead of b'{{'.")
    try:
        header = strict_json(raw)
    except ValueError as exc:
        _refuse(f"The header is not valid JSON: {exc}.")
    entries = cast("dict[str, object]", header)
    _check_metadata(entries.pop("__metadata__", {}))
    if len(entries) > limits.num_tensors:
        _refuse(f"The header names {len(entries):,} tensors; allowed: {limits.num_tensors:,}.")
    spans = [_read_entry(name, entry) for name, entry in entries.items()]
    return _in_order(spans, size_bytes - data_start), data_start


def _check_metadata(metadata: object) -> None:
    texts = cast("dict[str, object]", metadata).values() if isinstance(metadata, dict) else (None,)
    if not all(isinstance(text, str) for text in texts):
        _refuse("`__metadata__` holds something other than texts.")


def _is_sizes(value: object, *, most: int) -> bool:
    if not isinstance(value, list):
        return False
    sizes = cast("list[object]", value)
    return len(sizes) <= most and all(type(size) is int and 0 <= size < 2**48 for size in sizes)


def _read_entry(name: str, entry: object) -> _Span:
    if not name or len(name) > _MAX_NAME_CHARS or not name.isprintable():
        _refuse(f"The header names a tensor {name[:80]!r}; allowed: 1 to {_MAX_NAME_CHARS} printable characters.")
    if not isinstance(entry, dict) or set(cast("dict[str, object]", entry)) != {"dtype", "shape", "data_offsets"}:
        _refuse(f"The header entry of {name!r} needs exactly dtype, shape and data_offsets.")
    fields = cast("Mapping[str, object]", entry)
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        allowed = ", ".join(sorted(_DTYPES))
        _refuse(
            f"Tensor {name!r} has the type {dtype!r}; allowed: {allowed}.", "Convert the adapter and save it again."
        )
    if not _is_sizes(shape, most=_MAX_DIMENSIONS):
        _refuse(f"Tensor {name!r} has the shape {shape!r}; allowed: at most {_MAX_DIMENSIONS} sizes from 0.")
    if not _is_sizes(offsets, most=2) or len(cast("list[int]", offsets)) != 2:
        _refuse(f"Tensor {name!r} has the offsets {offsets!r}; allowed: two positions in the file.")
    start, end = cast("list[int]", offsets)
    sizes = tuple(cast("list[int]", shape))
    expected_bytes = math.prod(sizes) * _DTYPES[dtype][0]
    if end - start != expected_bytes:
        _refuse(f"Tensor {name!r} spans {end - start:,} bytes; {dtype} of shape {sizes} needs {expected_bytes:,}.")
    return _Span(name, dtype, sizes, start, end)


def _in_order(spans: list[_Span], data_bytes: int) -> list[_Span]:
    """Sort by position and insist that the spans tile the data exactly; empty tensors may share a position."""
    ordered = sorted(spans, key=lambda span: (span.start, span.end))
    position = 0
    for span in ordered:
        if span.start != position:
            fault = "overlaps the tensor before it" if span.start < position else "leaves a hole before it"
            _refuse(f"Tensor {span.name!r} starts at byte {span.start} and {fault}, which ends at {position}.")
        position = span.end
    if position != data_bytes:
        fault = "has trailing bytes" if position < data_bytes else "is cut short"
        _refuse(f"The weight file {fault}: its tensors end at byte {position:,}, the data at {data_bytes:,}.")
    return ordered


def _check_values(file: BinaryIO, span: _Span) -> CheckedTensor:
    """Read one tensor in pieces; hash it and look for an exponent of all ones, which only NaN and infinity have."""
    _, unsigned, exponent = _DTYPES[span.dtype]
    digest = hashlib.sha256()
    remaining = span.end - span.start
    while remaining:
        chunk = file.read(min(_CHUNK_BYTES, remaining))
        if not chunk:
            _refuse(f"The weight file ends inside tensor {span.name!r}.")
        digest.update(chunk)
        bits = np.frombuffer(chunk, dtype=unsigned)
        if bool(np.any((bits & exponent) == exponent)):
            hint = "The training diverged; lower the learning rate and train again."
            _refuse(f"Tensor {span.name!r} holds NaN or infinity.", hint)
        remaining -= len(chunk)
    return CheckedTensor(span.name, span.dtype, span.shape, digest.hexdigest())
