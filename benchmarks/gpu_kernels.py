"""Check and measure the Triton kernel on the GPU of this machine, and print the results as JSON.

Run it as `python -m benchmarks.gpu_kernels`. It compares with the reference, replays a CUDA graph with other rows and
weights, and measures what fraction of the copy bandwidth shrink and expand reach and what 64 distinct adapters add to
the products of a decoder at 64 rows. Weights together exceed the caches of the GPU, as those of a model do.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.machine import describe_revision
from server.kernels import Member, Segments, SlotWeights, load_kernel

__all__ = ["main"]

_ROWS = 64
_RANK = 16
_NUM_LAYERS = 8
# Inputs and outputs of the packed products of one layer of an 8B decoder.
_SHAPES = ((4096, (4096, 1024, 1024)), (4096, (4096,)), (4096, (14336, 14336)), (14336, (4096,)))
_TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
_COPY_BYTES = 2**30

_Group = tuple[int, list[Member]]  # Inputs, and the members that read them.


def _random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device="cuda").mul_(shape[-1] ** -0.5).to(dtype)


def _build_slot(num_in: int, width: int, rank: int, *, dtype: torch.dtype) -> SlotWeights:
    # B is stored by columns, as the kernel reads it.
    return SlotWeights(a=_random(rank, num_in, dtype=dtype), b=_random(rank, width, dtype=dtype).t())


def _build_group(num_in: int, widths: Sequence[int], ranks: Sequence[int], *, dtype: torch.dtype) -> _Group:
    starts = [sum(widths[:idx]) for idx in range(len(widths))]
    slots = [[_build_slot(num_in, width, rank, dtype=dtype) for rank in ranks] for width in widths]
    return num_in, [Member(*place) for place in zip(starts, widths, slots, strict=True)]


def _width(members: Sequence[Member]) -> int:
    return sum(member.width for member in members)


def _in_float64(members: Sequence[Member]) -> list[Member]:
    def convert(weights: SlotWeights | None) -> SlotWeights | None:
        if weights is None or weights.a is None or weights.b is None:
            return None
        return SlotWeights(a=weights.a.double(), b=weights.b.double())

    return [Member(member.start, member.width, [convert(slot) for slot in member.slots]) for member in members]


def _largest_error(found: Tensor, x: Tensor, y: Tensor, *, segments: Segments, members: Sequence[Member]) -> float:
    """Return the largest difference from the reference in float64, relative to its largest value."""
    exact = y.double()
    load_kernel("reference").apply_deltas_(exact, x.double(), segments=segments, members=_in_float64(members))
    return ((found.double() - exact).abs().max() / exact.abs().max()).item()


def _capture(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Return `run` as a graph, after runs that compile the programs and fill the tables."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def _measure_ms(run: Callable[[], object], *, repeats: int = 20) -> float:
    """Return the median time of one run on the GPU."""
    times: list[float] = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return median(times)


def _check_formula() -> dict[str, float]:
    """Compare with the reference for unequal ranks, widths and segments; raises AssertionError beyond the tolerance."""
    errors: dict[str, float] = {}
    segments = Segments((0, -1, 3, 1, 2, 0), (1, 3, 40, 16, 2, 0))
    for dtype, tolerance in _TOLERANCES.items():
        num_in, members = _build_group(2304, (512, 96, 128), (16, 1, 40, 64), dtype=dtype)
        num_tokens = sum(segments.sizes_tokens)
        x, y = _random(num_tokens, num_in, dtype=dtype), _random(num_tokens, _width(members), dtype=dtype)
        found = y.clone()
        load_kernel("triton").apply_deltas_(found, x, segments=segments, members=members)
        error = _largest_error(found, x, y, segments=segments, members=members)
        assert error < tolerance, f"{dtype}: error {error:.2e}, allowed {tolerance:.0e}."
        errors[str(dtype).removeprefix("torch.")] = error
    return errors


def _check_replay() -> None:
    """Replay a graph with other segments and weights than it was captured with; the answer must be that of a launch."""
    from server.kernels.triton import TritonKernel

    kernel, dtype, device = TritonKernel(), torch.bfloat16, torch.device("cuda", torch.cuda.current_device())
    num_in, members = _build_group(4096, (1024, 512), [_RANK] * 4, dtype=dtype)
    x, y = _random(4, num_in, dtype=dtype), _random(4, _width(members), dtype=dtype)
    result = y.clone()
    first, later = Segments((0, 1, -1), (1, 1, 2)), Segments((3, 2), (2, 2))

    def run() -> None:
        result.copy_(y)
        kernel.apply_deltas_(result, x, segments=first, members=members)

    graph = _capture(run)
    key = kernel.graph_key(first, [members], dtype=dtype, device=device)
    for member in members:
        slots: Any = member.slots
        slots[2] = _build_slot(num_in, member.width, _RANK // 2, dtype=dtype)
    assert kernel.graph_key(later, [members], dtype=dtype, device=device) == key, "The key of a like step changed."
    graph.replay()
    expected = y.clone()
    load_kernel("triton").apply_deltas_(expected, x, segments=later, members=members)
    torch.cuda.synchronize()
    assert torch.equal(result, expected), "The replay of a graph differs from a launch."


def _measure_copy_gb_per_s() -> float:
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * _COPY_BYTES / _measure_ms(lambda: target.copy_(source)) / 1e6


def _count_bytes(groups: Sequence[_Group]) -> dict[str, int]:
    """Return the bytes of adapter weights that shrink and expand must read."""
    slots = [slot for _, members in groups for member in members for slot in member.slots if slot is not None]
    return {
        "shrink": sum(slot.a.nbytes for slot in slots if slot.a is not None),
        "expand": sum(slot.b.nbytes for slot in slots if slot.b is not None),
    }


def _measure_programs(groups: Sequence[_Group], xs: Sequence[Tensor], ys: Sequence[Tensor]) -> dict[str, float]:
    """Return GB/s of the weights that shrink and expand read, by the GPU time the profiler gives them."""
    kernel, segments = load_kernel("triton"), Segments(tuple(range(_ROWS)), (1,) * _ROWS)

    def run() -> None:
        for (_, members), x, y in zip(groups, xs, ys, strict=True):
            kernel.apply_deltas_(y, x, segments=segments, members=members)

    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    times_us = {event.key: event.self_device_time_total for event in profile.key_averages()}
    return {name: num_bytes / times_us[name] / 1e3 for name, num_bytes in _count_bytes(groups).items()}


def _measure_overhead(groups: Sequence[_Group], xs: Sequence[Tensor], ys: Sequence[Tensor]) -> dict[str, float]:
    """Return the milliseconds of the products of all layers, as CUDA graphs, without and with adapters."""
    kernel, segments = load_kernel("triton"), Segments(tuple(range(_ROWS)), (1,) * _ROWS)
    weights = [_random(_width(members), num_in, dtype=torch.bfloat16) for num_in, members in groups]

    def run_base() -> None:
        for weight, x, y in zip(weights, xs, ys, strict=True):
            y.copy_(linear(x, weight))

    def run_adapters() -> None:
        for (_, members), weight, x, y in zip(groups, weights, xs, ys, strict=True):
            y.copy_(linear(x, weight))
            kernel.apply_deltas_(y, x, segments=segments, members=members)

    return {
        "base_ms": _measure_ms(_capture(run_base).replay),
        "adapters_ms": _measure_ms(_capture(run_adapters).replay),
    }


@torch.inference_mode()
def main() -> None:
    """Check and measure; exits with a message when there is no GPU or no Triton."""
    if not torch.cuda.is_available():
        sys.exit("No GPU here, so there is nothing to measure. Run it on a machine with an NVIDIA GPU.")
    errors = _check_formula()
    _check_replay()
    groups = [
        _build_group(num_in, widths, [_RANK] * _ROWS, dtype=torch.bfloat16)
        for _ in range(_NUM_LAYERS)
        for num_in, widths in _SHAPES
    ]
    xs = [_random(_ROWS, num_in, dtype=torch.bfloat16) for num_in, _ in groups]
    ys = [_random(_ROWS, _width(members), dtype=torch.bfloat16) for _, members in groups]
    copy = _measure_copy_gb_per_s()
    reached = _measure_programs(groups, xs, ys)
    times = _measure_overhead(groups, xs, ys)
    base_bytes = sum(2 * num_in * _width(members) for num_in, members in groups)
    results = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "revision": describe_revision(),
        "largest_error": errors,
        "copy_gb_per_s": round(copy),
        "share_of_copy": {name: round(rate / copy, 2) for name, rate in reached.items()},
        **{name: round(value, 3) for name, value in times.items()},
        "adapter_bytes_over_base_bytes": round(sum(_count_bytes(groups).values()) / base_bytes, 3),
        "adapters_over_base": round(times["adapters_ms"] / times["base_ms"], 3),
    }
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
