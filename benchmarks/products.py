"""Measure every linear of one step of a base, by batch and by way to multiply; adapter products beside them.

    python -m benchmarks.products --out benchmarks/results/products.json

Shapes are those of the embedded base, 30 layers with packed query, key, value and gate, up. Knows tensors only; what a
whole server does with them is measured by `benchmarks.serving`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.machine import describe_machine, describe_revision
from server.kernels import Member, Segments, SlotWeights, pick_kernel
from server.kernels.native import FloatWeight, Int8Weight, NF4Weight, find_library

_LAYERS = 30
_SHAPES = ((960, 576), (576, 576), (3072, 576), (576, 1536))
_MEMBERS = ((576, 192, 192), (576,), (1536, 1536), (576,))
_RANKS = (8, 16, 32)
_NUM_ADAPTERS = 16

_Multiply = Callable[[Tensor], Tensor]


def _measure_ms(run: Callable[[], object], repetitions: int) -> dict[str, float]:
    run()
    times: list[float] = []
    for _ in range(repetitions):
        begun = time.perf_counter()
        run()
        times.append((time.perf_counter() - begun) * 1e3)
    return {"min": min(times), "median": statistics.median(times), "max": max(times)}


def _dynamic_int8(weight: Tensor) -> _Multiply:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight)
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), dtype=torch.qint8)


def _ways() -> dict[str, Callable[[Tensor], _Multiply]]:
    library = find_library()
    assert library is not None, "The compiled kernels are what this script is about."
    library.num_threads = torch.get_num_threads()

    def packed(kind: type[FloatWeight] | type[Int8Weight], weight: Tensor) -> _Multiply:
        made = kind(weight, library)
        return lambda x: made.product(x, None)

    def in_nf4(weight: Tensor) -> _Multiply:
        codes = torch.randint(16, weight.shape, dtype=torch.uint8)
        made = NF4Weight(codes, torch.rand(weight.shape[0], weight.shape[1] // 64), library)
        return lambda x: made.product(x, None)

    return {
        "F.linear": lambda weight: lambda x: functional.linear(x, weight),
        "W @ x.T": lambda weight: lambda x: weight @ x.t(),
        "torch dynamic int8": _dynamic_int8,
        "ours float32": lambda weight: packed(FloatWeight, weight),
        "ours NF4": in_nf4,
        "ours int8": lambda weight: packed(Int8Weight, weight),
    }


def _step(multiply: list[list[_Multiply]], num_rows: int) -> Callable[[], None]:
    inputs = {width: torch.randn(num_rows, width) for _, width in _SHAPES}

    def run() -> None:
        for layer in multiply:
            for way, (_, width) in zip(layer, _SHAPES, strict=True):
                way(inputs[width])

    return run


def _adapters(kernel_name: str, num_distinct: int) -> Callable[[], None]:
    """Apply adapters of mixed ranks to 16 rows, all linears of all layers."""
    kernel = pick_kernel(kernel_name, device="cpu")
    segments = Segments(tuple(range(num_distinct)), (_NUM_ADAPTERS // num_distinct,) * num_distinct)
    calls: list[tuple[Tensor, Tensor, list[Member]]] = []
    for _ in range(_LAYERS):
        for widths, (num_out, num_in) in zip(_MEMBERS, _SHAPES, strict=True):
            starts = [sum(widths[:idx]) for idx in range(len(widths))]
            slots = [[_slot(_RANKS[idx % 3], width, num_in) for idx in range(num_distinct)] for width in widths]
            members = [Member(*place) for place in zip(starts, widths, slots, strict=True)]
            calls.append((torch.randn(_NUM_ADAPTERS, num_out), torch.randn(_NUM_ADAPTERS, num_in), members))

    def run() -> None:
        for y, x, members in calls:
            kernel.apply_deltas_(y, x, segments=segments, members=members)

    return run


def _slot(rank: int, width: int, num_in: int) -> SlotWeights:
    return SlotWeights(a=torch.randn(rank, num_in) / num_in, b=torch.randn(rank, width).t() / width)


@torch.inference_mode()
def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repetitions", type=int, default=15)
    given = parser.parse_args()
    products: dict[str, dict[str, dict[str, float]]] = {}
    for name, build in _ways().items():
        multiply = [[build(torch.randn(*shape)) for shape in _SHAPES] for _ in range(_LAYERS)]
        products[name] = {
            str(rows): _measure_ms(_step(multiply, rows), given.repetitions) for rows in (1, 4, 8, 16, 64, 256)
        }
        print(name, {rows: round(found["median"], 1) for rows, found in products[name].items()}, flush=True)
    adapters = {
        f"{kernel}, {distinct} distinct": _measure_ms(_adapters(kernel, distinct), given.repetitions)
        for kernel in ("cpu", "native")
        for distinct in (1, _NUM_ADAPTERS)
    }
    print({name: round(found["median"], 1) for name, found in adapters.items()})
    result = {"machine": describe_machine(), "revision": describe_revision(), "unit": "ms per step"}
    result |= {"products": products, "adapters_of_16_rows": adapters}
    given.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
