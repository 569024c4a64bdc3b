"""Draw the measured numbers: `python -m benchmarks.plots` writes a PNG beside each JSON file that is there.

Needs matplotlib (`pip install -e '.[bench]'`). Knows results only, nothing about how they came about.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["draw_batch", "draw_churn", "main"]

_RESULTS = Path(__file__).parent / "results"
_DPI = 120


def draw_batch(result: Mapping[str, Any], target: Path) -> None:
    """Draw tokens per second by number of distinct adapters: a line per system, bars from worst to best repetition."""
    lines: dict[str, list[tuple[int, dict[str, float]]]] = defaultdict(list)
    for case in result["cases"]:
        if case["kind"] == "single" or not case["spread"]:
            continue
        point = (case["num_adapters"], case["spread"]["tokens_per_s"])
        kinds = ["lora", "mixed"] if case["kind"] == "base" else [case["kind"]]
        for kind in kinds:
            lines[f"{case['system']}, all kinds" if kind == "mixed" else case["system"]].append(point)
    figure, axes = _figure()
    counts = sorted({count for points in lines.values() for count, _ in points})
    place = {count: idx for idx, count in enumerate(counts)}
    for name, points in lines.items():
        if name.endswith("all kinds") and all(count == 0 for count, _ in points):
            continue  # The base alone, of a system that serves one kind: its other line shows it.
        points.sort(key=lambda point: point[0])
        middle = [spread["median"] for _, spread in points]
        below = [spread["median"] - spread["min"] for _, spread in points]
        above = [spread["max"] - spread["median"] for _, spread in points]
        style = "--" if name.endswith("all kinds") else "-"
        places = [place[count] for count, _ in points]
        axes.errorbar(places, middle, yerr=[below, above], label=name, marker="o", linestyle=style, capsize=3)
    axes.set_xticks(range(len(counts)), ["base" if count == 0 else str(count) for count in counts])
    axes.set_xlabel("distinct adapters")
    axes.set_ylabel("output tokens/s")
    axes.set_ylim(bottom=0)
    axes.set_title(f"{result['config']['concurrency']} requests in flight, {result['base']}")
    _save(figure, axes, target)


def draw_churn(result: Mapping[str, Any], target: Path) -> None:
    """Draw which share of the answers was complete after how long, with a slot for each adapter and with few."""
    config, zipf = result["config"], result["zipf"]
    figure, axes = _figure()
    labels = {"resident": "a slot for each adapter", "slots": f"{config['slots']} slots"}
    for key, label in labels.items():
        axes.step(zipf["cdf_s"][key], zipf["cdf_percents"], where="post", label=label)
    axes.set_xlabel("seconds until the answer is complete")
    axes.set_ylabel("% of requests")
    axes.set_xlim(left=0)
    axes.set_title(f"{config['adapters']:,} adapters, Zipf traffic, first repetition")
    _save(figure, axes, target)


def _figure() -> tuple[Any, Any]:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(8, 5))


def _save(figure: Any, axes: Any, target: Path) -> None:
    from matplotlib import pyplot

    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(target, dpi=_DPI, metadata={"Software": None})
    pyplot.close(figure)


def main() -> None:
    """Draw what has been measured."""
    for name, draw in (("serving-batch", draw_batch), ("serving-churn", draw_churn)):
        path = _RESULTS / f"{name}.json"
        if path.is_file():
            draw(json.loads(path.read_text(encoding="utf-8")), path.with_suffix(".png"))
            print(f"Written: {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
