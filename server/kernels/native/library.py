"""Compile the C sources beside this file once per machine and load them.

The compiler is Zig's (https://ziglang.org/learn/overview/#zig-is-also-a-c-compiler), which comes as a Python package,
so that nothing else must be installed. The result is kept beside the sources, or in the home folder where that place
cannot be written, by the digest of sources, compiler and processor. Knows files and processes; no tensors.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import logging
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from adapterhub.settings import load_settings

__all__ = ["Library", "find_library"]

_log = logging.getLogger(__name__)
_SOURCES = Path(__file__).parent
# Contraction gives fused multiply-add; no other liberty is taken, so that sums keep the order the source gives them.
_FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-sanitize=undefined", "-shared", "-fPIC")
_COMPILE_TIMEOUT_S = 300

_P, _N, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_SIGNATURES: dict[str, tuple[object, ...]] = {
    "gemm_f32": (*[_P] * 4, *[_N] * 5, _I),
    "gemm_nf4": (*[_P] * 7, *[_N] * 6, _I),
    "quantize_rows": (*[_P] * 4, *[_N] * 3, _I),
    "gemm_int8": (*[_P] * 8, *[_N] * 5, _I),
    "apply_deltas": (*[_P] * 6, *[_N] * 7, _I),
    "decode_attention": (*[_P] * 6, *[_N] * 9, _F, _F, _I),
    "rms_norm": (*[_P] * 5, *[_N] * 2, _F, _I),
    "silu_product": (*[_P] * 2, *[_N] * 2, _I),
    "rotate": (*[_P] * 3, *[_N] * 5, _I),
    "write_cache": (*[_P] * 3, *[_N] * 6),
}


class Library:
    """The compiled functions; pointers are integers, `Tensor.data_ptr()`. They release the interpreter's lock.

    panel_f32, panel_int8: outputs per panel of a packed weight; block_int8: inputs that share a scale; chunk_tokens:
    most tokens of one chunk; max_head_dim: widest head; has_vnni: whether the processor multiplies bytes directly.
    num_threads: threads one call may use; set by whoever owns the process.
    """

    gemm_f32: Callable[..., None]
    gemm_nf4: Callable[..., None]
    quantize_rows: Callable[..., None]
    gemm_int8: Callable[..., None]
    apply_deltas: Callable[..., None]
    decode_attention: Callable[..., None]
    rms_norm: Callable[..., None]
    silu_product: Callable[..., None]
    rotate: Callable[..., None]
    write_cache: Callable[..., None]

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_threads = 1
        handle = ctypes.CDLL(str(path))
        for name, arguments in _SIGNATURES.items():
            function = getattr(handle, f"native_{name}")
            function.argtypes, function.restype = arguments, None
            setattr(self, name, function)
        self.panel_f32: int = handle.native_panel_f32()
        self.panel_int8: int = handle.native_panel_int8()
        self.block_int8: int = handle.native_block_int8()
        self.chunk_tokens: int = handle.native_chunk_tokens()
        self.max_head_dim: int = handle.native_max_head_dim()
        self.has_vnni = bool(handle.native_has_vnni())


@functools.cache
def find_library() -> Library | None:
    """Return the library, compiled if need be, or None with a warning that says why and what it costs."""
    try:
        library = Library(_compile(_folder()))
    except (OSError, subprocess.SubprocessError, PackageNotFoundError) as exc:
        _log.warning(
            "no compiled kernels, so steps take two to four times as long: %s. They need Linux and ziglang.",
            _reason(exc),
        )
        return None
    _log.info("compiled kernels: %s", library.path)
    return library


def _folder() -> Path:
    return _SOURCES / "build" if os.access(_SOURCES, os.W_OK) else load_settings().home / "kernels"


def _compile(folder: Path) -> Path:
    """Return the path of the shared object, compiling it unless it is there. Raises OSError or SubprocessError."""
    if sys.platform != "linux":
        raise OSError(f"{sys.platform} is not supported")
    if importlib.util.find_spec("ziglang") is None:
        raise PackageNotFoundError("ziglang")
    target = folder / f"native-{_digest()}.so"
    if target.is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        made = Path(work) / target.name
        sources = sorted(str(path) for path in _SOURCES.glob("*.c"))
        command = [sys.executable, "-m", "ziglang", "cc", *_FLAGS, "-o", str(made), *sources]
        environment = os.environ | {"ZIG_GLOBAL_CACHE_DIR": f"{work}/zig", "ZIG_LOCAL_CACHE_DIR": f"{work}/zig"}
        _log.info("compiling kernels for this processor; this takes some seconds, once")
        subprocess.run(command, check=True, capture_output=True, timeout=_COMPILE_TIMEOUT_S, env=environment)
        made.replace(target)
    return target


def _digest() -> str:
    """Name what the result depends on: sources, flags, compiler and processor."""
    digest = hashlib.sha256()
    for path in sorted(_SOURCES.glob("*.[ch]")):
        digest.update(path.name.encode() + path.read_bytes())
    digest.update(repr((_FLAGS, version("ziglang"), platform.machine(), _processor())).encode())
    return digest.hexdigest()[:16]


def _processor() -> str:
    """Model and instruction sets of this processor: a home folder may be shared between machines."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def _reason(exc: Exception) -> str:
    if isinstance(exc, subprocess.CalledProcessError):
        return f"the compiler failed with {exc.stderr.decode(errors='replace').strip()[:500]!r}"
    return f"{type(exc).__name__}: {exc}"
