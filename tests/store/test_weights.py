"""The safetensors check: every way in which a header can lie is refused, with a message that names it."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch_file

from adapterhub.errors import AdapterWeightsError
from adapterhub.store.weights import Limits, check_weights

LIMITS = Limits()


def _write(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def _entry(start: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - start) // 4] if shape is None else shape, "data_offsets": [start, end]}


ONE = {"a": _entry(0, 8)}
BAD_FILES: list[tuple[str, Any, bytes, str]] = [
    ("empty header", b"", b"", "The header starts with b'' instead of b'{'."),
    ("leading space", b' {"a": 1}', b"", "The header starts with b' ' instead of b'{'."),
    ("list", b"[]", b"", "The header starts with b'['"),
    ("no JSON", b"{nonsense", b"", "The header is not valid JSON"),
    ("not UTF-8", b'{"\xff": 1}', b"", "The header is not valid JSON: 'utf-8' codec"),
    ("NaN", b'{"a": NaN}', b"", "NaN is not JSON"),
    ("deep nesting", b'{"a":' * 100_000, b"", "The header is not valid JSON: it nests too deeply."),
    ("huge number", b'{"a": ' + b"9" * 5000 + b"}", b"", "The header is not valid JSON"),
    ("twice the same tensor", b'{"a": 1, "a": 2}', b"", "the key 'a' occurs twice"),
    (
        "twice the same offsets",
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], "data_offsets": [4, 8]}}',
        b"",
        "the key 'data_offsets' occurs twice",
    ),
    ("metadata list", {"__metadata__": []}, b"", "`__metadata__` holds something other than texts."),
    ("metadata number", {"__metadata__": {"x": 1}}, b"", "`__metadata__` holds something other than texts."),
    ("entry is a number", {"a": 1}, b"", "The header entry of 'a' needs exactly dtype, shape and data_offsets."),
    ("extra key", {"a": {**_entry(0, 4), "x": 1}}, b"0000", "needs exactly dtype, shape and data_offsets."),
    ("no name", {"": _entry(0, 4)}, b"0000", "The header names a tensor ''; allowed: 1 to 512 printable characters."),
    ("long name", {"a" * 600: _entry(0, 4)}, b"0000", "allowed: 1 to 512 printable characters."),
    ("control name", {"a\n": _entry(0, 4)}, b"0000", "The header names a tensor 'a\\n'"),
    ("integers", {"a": _entry(0, 4, dtype="I32")}, b"0000", "'a' has the type 'I32'; allowed: BF16, F16, F32."),
    ("dtype number", {"a": {**_entry(0, 4), "dtype": 7}}, b"0000", "Tensor 'a' has the type 7; allowed"),
    ("negative size", {"a": _entry(0, 4, [-1])}, b"0000", "Tensor 'a' has the shape [-1]; allowed: at most 4 sizes"),
    ("size is true", {"a": _entry(0, 4, [True])}, b"0000", "Tensor 'a' has the shape [True]"),
    ("many sizes", {"a": _entry(0, 4, [1] * 5)}, b"0000", "allowed: at most 4 sizes from 0."),
    ("overflow", {"a": _entry(0, 4, [2**62, 4])}, b"0000", "Tensor 'a' has the shape [4611686018427387904, 4]"),
    (
        "one offset",
        {"a": {**_entry(0, 4), "data_offsets": [0]}},
        b"0000",
        "has the offsets [0]; allowed: two positions",
    ),
    ("float offset", {"a": {**_entry(0, 4), "data_offsets": [0, 4.0]}}, b"0000", "has the offsets [0, 4.0]"),
    ("backwards", {"a": {**_entry(0, 4), "data_offsets": [4, 0]}}, b"0000", "Tensor 'a' spans -4 bytes"),
    ("wrong size", {"a": _entry(0, 4, [2])}, b"0000", "Tensor 'a' spans 4 bytes; F32 of shape (2,) needs 8."),
    (
        "overlap",
        {"a": _entry(0, 8), "b": _entry(4, 12)},
        b"0" * 12,
        "'b' starts at byte 4 and overlaps the tensor before",
    ),
    ("hole", {"a": _entry(0, 4), "b": _entry(8, 12)}, b"0" * 12, "'b' starts at byte 8 and leaves a hole before it"),
    ("late start", {"a": _entry(4, 8)}, b"0" * 8, "Tensor 'a' starts at byte 4 and leaves a hole before it"),
    ("trailing bytes", ONE, b"0" * 9, "The weight file has trailing bytes: its tensors end at byte 8, the data at 9."),
    ("cut short", ONE, b"0" * 7, "The weight file is cut short: its tensors end at byte 8, the data at 7."),
]


@pytest.mark.parametrize(
    ("header", "data", "message"), [bad[1:] for bad in BAD_FILES], ids=[bad[0] for bad in BAD_FILES]
)
def test_a_bad_file_is_refused_with_its_fault(tmp_path: Path, header: Any, data: bytes, message: str) -> None:
    path = _write(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(AdapterWeightsError) as caught:
        check_weights(path, limits=LIMITS)
    assert message in caught.value.what
    assert "save" in caught.value.hint


def test_a_file_shorter_than_its_length_field_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"123")
    with pytest.raises(AdapterWeightsError, match="has 3 bytes; a safetensors file has at least 8"):
        check_weights(tmp_path / "short", limits=LIMITS)


def test_a_header_longer_than_the_file_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "long", ONE, length=1000)
    with pytest.raises(AdapterWeightsError, match="states a header of 1,000 bytes but has 69 bytes in all"):
        check_weights(path, limits=LIMITS)


def test_a_huge_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = _write(tmp_path / "huge", ONE, length=2**63)
    with pytest.raises(
        AdapterWeightsError, match="states a header of 9,223,372,036,854,775,808 bytes; allowed: 16,777,216"
    ):
        check_weights(path, limits=LIMITS)


def test_too_many_tensors_are_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "many", {f"t{idx}": _entry(0, 0) for idx in range(11)})
    with pytest.raises(AdapterWeightsError, match="names 11 tensors; allowed: 10"):
        check_weights(path, limits=Limits(num_tensors=10))


def test_a_file_over_the_size_cap_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "big", ONE, b"0" * 8)
    with pytest.raises(AdapterWeightsError) as caught:
        check_weights(path, limits=Limits(file_bytes=20))
    assert str(caught.value) == "The weight file has 77 bytes; allowed: 20. Lower the rank."


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_found_wherever_it_is(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    tensor = torch.ones(600_000, dtype=dtype)
    tensor[-1] = value  # Beyond the first chunk.
    save_torch_file({"fine": torch.ones(3), "sick": tensor}, tmp_path / "x")
    with pytest.raises(AdapterWeightsError) as caught:
        check_weights(tmp_path / "x", limits=LIMITS)
    assert caught.value.what == "Tensor 'sick' holds NaN or infinity."
    assert caught.value.hint == "The training diverged; lower the learning rate and train again."


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_largest_and_smallest_finite_values_pass(tmp_path: Path, dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    tensor = torch.tensor([limits.max, limits.min, limits.tiny, limits.smallest_normal, 0.0, -0.0], dtype=dtype)
    save_torch_file({"a": tensor}, tmp_path / "x")
    (checked,) = check_weights(tmp_path / "x", limits=LIMITS)
    assert (checked.name, checked.shape) == ("a", (6,))


def test_tensors_without_values_may_share_a_position(tmp_path: Path) -> None:
    save_file(
        {"a": np.zeros((0, 4), np.float32), "b": np.zeros((2, 0), np.float32), "c": np.ones(2, np.float32)},
        tmp_path / "x",
    )
    assert [tensor.name for tensor in check_weights(tmp_path / "x", limits=LIMITS)] == ["a", "b", "c"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_corrupted_header_never_raises_anything_else(tmp_path: Path, data: st.DataObject) -> None:
    save_file({"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float32)}, tmp_path / "x", {"format": "pt"})
    raw = bytearray((tmp_path / "x").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "y").write_bytes(bytes(raw[: data.draw(st.integers(0, len(raw)))]))
    try:
        tensors = check_weights(tmp_path / "y", limits=LIMITS)
    except AdapterWeightsError:
        return
    assert all(tensor.dtype in {"F32", "F16", "BF16"} for tensor in tensors)
