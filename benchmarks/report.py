"""Write the measured numbers into docs/benchmarks.md: tables between markers, made from the JSON files alone.

python -m benchmarks.report            # after a measurement, with the plots of `benchmarks.plots`
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["SECTIONS", "main", "render_table", "rendered"]

_RESULTS = Path(__file__).parent / "results"
_PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
_KINDS = {"single": "base, one request at a time", "base": "base", "lora": "LoRA", "mixed": "all kinds"}


def render_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a Markdown table; the first column is left-aligned, numbers right-aligned."""
    lines = [" | ".join(header), " | ".join(["---", *["---:"] * (len(header) - 1)])]
    lines += [" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def rendered(page: str, results: Path) -> str:
    """Return the page with every marked section written anew from the files in `results`.

    Raises ValueError for a marker that names no section, or that is never closed.
    """

    def section(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in SECTIONS:
            raise ValueError(f"The page marks a section {name!r}; there are: {', '.join(SECTIONS)}.")
        file, write, command = SECTIONS[name]
        path = results / file
        body = f"Not measured yet: `{command}`."
        if path.is_file():
            body = write(json.loads(path.read_text(encoding="utf-8")))
        return f"<!-- begin: {name} -->\n{body}\n<!-- end: {name} -->"

    begun, ended = len(re.findall(r"<!-- begin: ", page)), len(re.findall(r"<!-- end: ", page))
    if begun != ended:
        raise ValueError(f"The page begins {begun} sections and ends {ended}.")
    return re.sub(r"<!-- begin: (\S+) -->\n.*?<!-- end: \1 -->", section, page, flags=re.DOTALL)


def _origin(result: Mapping[str, Any]) -> str:
    machine = result["machine"]
    versions: dict[str, str] = {}
    for case in result.get("cases", ()):
        versions |= {name: version for name, version in case["versions"].items() if name not in ("torch", "peft")}
    shown = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()) if name != "transformers")
    return (
        f"{machine['cpu']}, {machine['num_cpus']} CPUs, {machine['memory_gib']} GiB; torch {machine['torch']}, "
        f"transformers {machine['transformers']}, PEFT {machine['peft']}{', ' + shown if shown else ''}; "
        f"revision `{result['revision']}`."
    )


def _span(spread: Mapping[str, Any], metric: str, digits: int, factor: float = 1.0) -> str:
    """Median, and in brackets the smallest and largest repetition."""
    if metric not in spread:
        return ""
    low, middle, high = (f"{factor * spread[metric][key]:,.{digits}f}" for key in ("min", "median", "max"))
    return f"{middle} ({low} to {high})"


def _batch(result: Mapping[str, Any]) -> str:
    header = ["system", "work", "adapters", "tokens/s", "first token p50, s", "p99, s", "per token p50, ms", "p99, ms"]
    header += ["peak, MiB", "per adapter, MiB", "same tokens as reference"]
    rows: list[list[str]] = []
    for case in result["cases"]:
        spread = case["spread"]
        if not spread:
            rows.append([case["system"], _KINDS[case["kind"]], str(case["num_adapters"]), "failed", *[""] * 7])
            continue
        equal = case["equal_tokens"]
        rows.append(
            [
                case["system"],
                _KINDS[case["kind"]],
                str(case["num_adapters"]),
                _span(spread, "tokens_per_s", 1),
                f"{spread['ttft_p50_s']['median']:.2f}",
                f"{spread['ttft_p99_s']['median']:.2f}",
                f"{1000 * spread['tpot_p50_s']['median']:.0f}",
                f"{1000 * spread['tpot_p99_s']['median']:.0f}",
                f"{spread['peak_mib']['median']:,.0f}",
                f"{spread['adapter_mib']['median']:.1f}" if "adapter_mib" in spread else "",
                "" if equal is None else f"{100 * equal:.1f} %",
            ]
        )
    config, prompts = result["config"], result["prompt_tokens"]
    intro = (
        f"{config['concurrency']} requests in flight, prompts of {prompts['min']} to {prompts['max']} tokens (median "
        f"{prompts['median']}), {config['new_tokens']} new tokens each, {config['threads']} threads, "
        f"{config['repetitions']} repetitions, all systems in turn. Rates: median (lowest to highest repetition); the "
        f"rest: median. {_origin(result)}"
    )
    return f"{intro}\n\n{render_table(header, rows)}\n\n![Tokens per second](../benchmarks/results/serving-batch.png)"


def _ratios(result: Mapping[str, Any]) -> str:
    """The targets of the design, each as a ratio of medians."""
    rates = {case["label"]: case["spread"].get("tokens_per_s", {}).get("median") for case in result["cases"]}
    pairs = [
        ("16 adapters against PEFT", "ours-float32-lora-16", "peft-lora-16"),
        ("16 adapters against vLLM", "ours-float32-lora-16", "vllm-float32-lora-16"),
        ("16 adapters against our base, float32", "ours-float32-lora-16", "ours-float32-base-0"),
        ("16 adapters against our base, int8", "ours-int8-lora-16", "ours-int8-base-0"),
        ("64 adapters against our base, float32", "ours-float32-lora-64", "ours-float32-base-0"),
        ("16 adapters of all kinds against 16 of LoRA", "ours-float32-mixed-16", "ours-float32-lora-16"),
        ("base against vLLM", "ours-float32-base-0", "vllm-float32-base-0"),
        ("base against transformers", "ours-float32-base-0", "transformers-base-0"),
        ("one request, int8, against llama.cpp Q4_1", "ours-int8-single-0", "llama.cpp-q4_1-single-0"),
    ]
    rows = [
        [what, f"{rates[ours] / rates[theirs]:.2f}"]
        for what, ours, theirs in pairs
        if rates.get(ours) and rates.get(theirs)
    ]
    return render_table(["ratio of tokens/s", "measured"], rows) if rows else "The systems to compare were not run."


def _churn(result: Mapping[str, Any]) -> str:
    spread, config, swaps = result["zipf"]["spread"], result["config"], result["swaps"]
    rows = [
        [
            name,
            _span(spread, f"{prefix}_p50_s", 2),
            _span(spread, f"{prefix}_p99_s", 2),
            _span(spread, f"{prefix}_first_p50_s", 2),
            _span(spread, f"{prefix}_first_p99_s", 2),
            f"{spread[f'{prefix}_wrong']['max']:.0f}",
            f"{spread[f'{prefix}_failed']['max']:.0f}",
        ]
        for name, prefix in (("a slot for each", "resident"), (f"{config['slots']} slots", "slots"))
    ]
    rows.append(["ratio", _span(spread, "ratio_p50", 2), _span(spread, "ratio_p99", 2), "", "", "", ""])
    header = ["", "answer p50, s", "answer p99, s", "first token p50, s", "first token p99, s", "wrong", "failed"]
    tiers = ", ".join(
        f"{1000 * result['tiers'][f'{tier}_first_p50_s']:.0f} ms {where}"
        for tier, where in (("disk", "from disk"), ("host", "from memory"), ("slot", "from its slot"))
    )
    text = (
        f"{config['adapters']:,} adapters, Zipf exponent {config['skew']}, {config['requests']} requests of "
        f"{config['new_tokens']} tokens, Poisson arrivals at {_span(spread, 'rate_per_s', 1)} requests/s, "
        f"{config['load']:.0%} of what the first engine can do. {_origin(result)}\n\n{render_table(header, rows)}\n\n"
        f"Time to first token of a request alone, by where its adapter is: {tiers}."
    )
    if swaps:
        text += (
            f"\n\nHot swap over HTTP under load: a new version is published in {1000 * swaps['publish_p50_s']:.0f} ms "
            f"(p99 {1000 * swaps['publish_p99_s']:.0f}); {swaps['flip_p50_s']:.2f} s (p99 {swaps['flip_p99_s']:.2f}) "
            f"after the alias moved, its first answer is complete. {swaps['answers']:,} answers, "
            f"{swaps['wrong']} wrong, {swaps['failed']} failed."
        )
    return f"{text}\n\n![Latency under Zipf traffic](../benchmarks/results/serving-churn.png)"


def _accuracy(result: Mapping[str, Any]) -> str:
    values, config = result["perplexity"], result["config"]
    names = {"transformers": "transformers, float32", "float32": "float32", "int8": "int8"}
    first = render_table(["arithmetic", "perplexity"], [[names[key], f"{values[key]:.3f}"] for key in names])
    rows = [
        [
            f"{task} ({one['metric']}, {one['num_rows']} rows)",
            f"{one['float32']:.4f}",
            f"{one['int8']:.4f}",
            f"{one['difference']:+.4f} ({one['low']:+.4f} to {one['high']:+.4f})",
        ]
        for task, one in result["tasks"].items()
    ]
    second = render_table(["task", "float32", "int8", "int8 minus float32, interval"], rows)
    return (
        f"Base {result['base']} ({result['quantization']}), {config['documents']} documents of "
        f"{config['document_tokens']} tokens. {_origin(result)}\n\n{first}\n\n{second}"
    )


# Marker in the page -> file, how it is written, and the command that measures it.
SECTIONS: Mapping[str, tuple[str, Callable[[Mapping[str, Any]], str], str]] = {
    "batch": ("serving-batch.json", _batch, "make bench-serving"),
    "ratios": ("serving-batch.json", _ratios, "make bench-serving"),
    "churn": ("serving-churn.json", _churn, "python -m benchmarks.churn"),
    "accuracy": ("serving-accuracy.json", _accuracy, "python -m benchmarks.accuracy"),
}


def main() -> None:
    """Update the page in place."""
    _PAGE.write_text(rendered(_PAGE.read_text(encoding="utf-8"), _RESULTS), encoding="utf-8")
    print(f"Written: {_PAGE}")


if __name__ == "__main__":
    main()
