"""Every system that can be measured: where its code and its environment are, and which work it can do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = ["SYSTEMS", "Kind", "System"]

Kind = Literal["single", "base", "lora", "mixed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """One system in one arithmetic.

    module: in this package, with `run(job)`; peer: the environment of `benchmarks.peers` it needs, None for ours;
    kinds: work it can do; adapter_counts: numbers of distinct adapters it is measured with; note: what to know when
    reading its numbers.
    """

    name: str
    module: str
    compute: str
    peer: str | None
    kinds: tuple[Kind, ...]
    adapter_counts: tuple[int, ...]
    note: str


_OURS_COUNTS = (1, 4, 16, 64)
_PEER_COUNTS = (1, 4, 16)


def _ours(compute: str, note: str) -> System:
    return System(
        name=f"ours-{compute}",
        module="ours",
        compute=compute,
        peer=None,
        kinds=("single", "base", "lora", "mixed"),
        adapter_counts=_OURS_COUNTS,
        note=note,
    )


def _vllm(compute: str) -> System:
    return System(
        name=f"vllm-{compute}",
        module="vllm_engine",
        compute=compute,
        peer="vllm",
        kinds=("single", "base", "lora"),
        adapter_counts=_PEER_COUNTS,
        note=f"vLLM's CPU build, {compute}, compiled graphs; of the adapter kinds it serves LoRA and rsLoRA only.",
    )


def _llama_cpp(compute: str, weights: str) -> System:
    return System(
        name=f"llama.cpp-{compute}",
        module="llama_cpp_batch",
        compute=compute,
        peer="llama_cpp",
        kinds=("single", "base"),
        adapter_counts=(),
        note=f"llama.cpp, {weights}; one adapter per context, so it cannot batch requests of several adapters.",
    )


SYSTEMS: Mapping[str, System] = {
    system.name: system
    for system in (
        _ours("float32", "This project, exact float32, in process."),
        _ours("int8", "This project, 8-bit products of the base's linears, in process."),
        System(
            name="ours-http",
            module="ours_http",
            compute="float32",
            peer=None,
            kinds=("lora",),
            adapter_counts=(16,),
            note="This project, exact float32, through `hub serve` and streamed answers.",
        ),
        System(
            name="transformers",
            module="hf_generate",
            compute="float32",
            peer=None,
            kinds=("single", "base"),
            adapter_counts=(),
            note="`model.generate` on one left-padded batch, float32.",
        ),
        System(
            name="peft",
            module="hf_generate",
            compute="float32",
            peer=None,
            kinds=("lora",),
            adapter_counts=_PEER_COUNTS,
            note="`model.generate(adapter_names=...)`, float32: a loop over the adapters in every linear; LoRA only.",
        ),
        _vllm("float32"),
        _vllm("bfloat16"),
        _llama_cpp("float32", "float32 weights"),
        _llama_cpp("q4_1", "the published Q4_1 weights"),
    )
}
