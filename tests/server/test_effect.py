"""The effect report against changes of weights written out in float64, and the probe against the model itself."""

from __future__ import annotations

import math
import statistics
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adapterhub.base.identity import Base
from adapterhub.base.loading import load_model, load_tokenizer
from adapterhub.base.prompts import text_token_ids
from adapterhub.errors import AdapterLoadError
from adapterhub.records import EffectReport, Method
from server.engine.build import build_engine
from server.engine.engine import NativeEngine
from server.engine.loader import load_adapter
from server.engine.probe import PROBE_PROMPT, compare, probe
from server.engine.types import AdapterHandle, TokenLogprob, TokenScore
from server.layers import serving_weight
from tests.support.adapters import METHODS, open_with_peft, write_adapter
from tests.support.tiny_models import build_base

KINDS: dict[str, dict[str, Any]] = {
    **{method: {"method": method} for method in METHODS},
    "rslora": {"method": "lora", "rank": 7, "use_rslora": True},
    "patterns": {"method": "lora", "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 40}},
    "layer": {"method": "lora", "rank": 6, "layers_to_transform": [1], "layers_pattern": "layers"},
    "inputs": {"method": "ia3", "target_modules": ["q_proj", "gate_proj"], "feedforward_modules": ["gate_proj"]},
    "pruned": {"method": "adalora", "rank": 1, "pruned": True, "seed": 4},
    "nearly_untrained_dora": {"method": "dora", "strength": 1e-3},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return build_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def model(base: Base) -> torch.nn.Module:
    return load_model(base)


def merged_weights(base: Base, view: Path) -> dict[str, Tensor]:
    """The weights of every linear after PEFT has merged the adapter into a float64 base."""
    merged: Any = open_with_peft(load_model(base), view).double().merge_and_unload()
    return {name: merged.get_submodule(name).weight.detach() for name in base.modules}


def report_of(view: Path, base: Base, model: torch.nn.Module) -> EffectReport:
    measure = load_adapter(view, base, model).measure
    assert measure is not None
    return measure()


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_equal_those_of_the_change_written_out(
    kind: str, base: Base, model: torch.nn.Module, tmp_path: Path
) -> None:
    view = write_adapter(tmp_path / "view", base, as_view=True, **KINDS[kind])
    report = report_of(view, base, model)
    before = {name: serving_weight(model.get_submodule(name)).double() for name in base.modules}
    changes = {name: after - before[name] for name, after in merged_weights(base, view).items()}
    changed = {name: change for name, change in changes.items() if change.any()}
    assert set(report.modules) == set(changed)
    for name, effect in report.modules.items():
        wanted = float(changed[name].norm() / before[name].norm())
        assert math.isclose(effect.relative_size, wanted, rel_tol=1e-4), name
    sizes = [effect.relative_size for effect in report.modules.values()]
    assert report.max_relative_size == max(sizes)
    assert report.median_relative_size == statistics.median(sizes)
    norm, of = (math.hypot(*(float(one[name].norm()) for name in changed)) for one in (changes, before))
    assert math.isclose(report.total_relative_size, norm / of, rel_tol=1e-4)


def test_a_report_counts_what_is_changed_pruned_and_left_alone(
    base: Base, model: torch.nn.Module, tmp_path: Path
) -> None:
    layer = report_of(write_adapter(tmp_path / "a", base, as_view=True, **KINDS["layer"]), base, model)
    assert layer.method is Method.LORA
    assert all(".layers.1." in name for name in layer.modules)
    assert (len(layer.modules), layer.num_untouched, layer.num_pruned) == (7, 7, 0)
    pruned = report_of(write_adapter(tmp_path / "b", base, as_view=True, **KINDS["pruned"]), base, model)
    assert pruned.num_pruned > 0
    assert len(pruned.modules) + pruned.num_pruned == 14


def test_a_report_names_targets_that_the_base_does_not_have(base: Base, model: torch.nn.Module, tmp_path: Path) -> None:
    view = write_adapter(tmp_path, base, method="lora", target_modules=["q_proj", "qkv_proj"], as_view=True)
    report = report_of(view, base, model)
    assert report.unmatched_targets == ("qkv_proj",)
    assert {name.rpartition(".")[2] for name in report.modules} == {"q_proj"}


def test_a_report_states_rank_and_scale_of_each_module(base: Base, model: torch.nn.Module, tmp_path: Path) -> None:
    found = report_of(write_adapter(tmp_path / "a", base, as_view=True, **KINDS["patterns"]), base, model).modules
    assert found["model.layers.0.self_attn.q_proj"].rank == 3
    assert found["model.layers.0.self_attn.q_proj"].scale == pytest.approx(16 / 3)
    assert found["model.layers.1.self_attn.v_proj"].rank == 8
    assert found["model.layers.1.self_attn.v_proj"].scale == pytest.approx(40 / 8)
    rslora = report_of(write_adapter(tmp_path / "b", base, as_view=True, **KINDS["rslora"]), base, model).modules
    assert rslora["model.layers.0.mlp.up_proj"].scale == pytest.approx(14 / 7**0.5)
    ia3 = report_of(write_adapter(tmp_path / "c", base, method="ia3", as_view=True), base, model).modules
    assert {(effect.rank, effect.scale) for effect in ia3.values()} == {(0, None)}


def test_sizes_are_relative_to_the_quantized_weights(tmp_path: Path) -> None:
    base = build_base(tmp_path / "base", "qwen2", quantization="nf4")
    model = load_model(base, keep_quantized=True)
    view = write_adapter(tmp_path / "view", base, method="dora", as_view=True)
    report = report_of(view, base, model)
    for name, effect in report.modules.items():
        before = serving_weight(model.get_submodule(name)).double()
        slot = load_adapter(view, base, model).modules[name]
        assert slot.a is not None and slot.b is not None and slot.out_scale is not None  # noqa: PT018
        after = slot.out_scale.double()[:, None] * (before + slot.b.double() @ slot.a.double())
        assert math.isclose(effect.relative_size, float((after - before).norm() / before.norm()), rel_tol=1e-4)


@asynccontextmanager
async def running(base: Base) -> AsyncIterator[NativeEngine]:
    engine = build_engine(base, num_slots=2, kv_memory_mib=8)
    await engine.start()
    try:
        yield engine
        engine.check_integrity()
    finally:
        await engine.stop()


def probe_tokens(base: Base) -> list[int]:
    return text_token_ids(load_tokenizer(base), PROBE_PROMPT)


@pytest.mark.parametrize("method", METHODS)
async def test_the_probe_measures_what_the_adapter_does_to_the_next_token(
    method: str, base: Base, tmp_path: Path
) -> None:
    view = write_adapter(tmp_path / "view", base, method=method, as_view=True, strength=0.3)
    tokens = probe_tokens(base)
    async with running(base) as engine:
        found = await probe(engine, AdapterHandle.alone("d" * 64, lambda: view, "task@v1"), tokens)
        assert engine.status().num_running == engine.status().num_waiting == 0
    ids = torch.tensor([tokens])
    with torch.no_grad():
        base_model = load_model(base)
        q = base_model(ids).logits[0, -1].double().log_softmax(-1)
        p = open_with_peft(base_model, view)(ids).logits[0, -1].double().log_softmax(-1)
    assert found.num_tokens == len(p)
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-3)
    assert found.max_logprob_difference == pytest.approx(float((p - q).abs().max()), rel=1e-3)


async def test_a_probe_without_any_difference_is_an_error(base: Base, tmp_path: Path) -> None:
    view = write_adapter(tmp_path / "view", base, method="lora", as_view=True, strength=1e-12)
    async with running(base) as engine:
        handle = AdapterHandle.alone("d" * 64, lambda: view, "task@v1")
        assert await engine.measure(handle) is not None
        with pytest.raises(AdapterLoadError) as caught:
            await probe(engine, handle, probe_tokens(base))
    assert str(caught.value) == (
        f"With adapter 'task@v1' the next token after {PROBE_PROMPT!r} is as likely as without, for each of 259 "
        "tokens: it has no effect. Its weights are too small to change float32 results; train it longer, or use the "
        "base."
    )


async def test_a_probe_of_an_adapter_that_cannot_be_loaded_says_why(base: Base, tmp_path: Path) -> None:
    async with running(base) as engine:
        with pytest.raises(AdapterLoadError, match=r"^Adapter 'task@v1' cannot be loaded: Cannot read "):
            await probe(engine, AdapterHandle.alone("d" * 64, lambda: tmp_path, "task@v1"), probe_tokens(base))


def listed(logprobs: dict[int, float]) -> TokenLogprob:
    scores = tuple(TokenScore(token, "", b"", logprob) for token, logprob in logprobs.items())
    return TokenLogprob(scores[0], scores)


def test_a_divergence_of_lists_is_a_lower_bound_of_that_of_all_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(1000, generator=generator, dtype=torch.float64).mul(4).log_softmax(0) for _ in range(2))
    exact = float((p.exp() * (p - q)).sum())
    bounds = []
    for num_listed in (1, 10, 100, 500, 1000):
        tops = [one.topk(num_listed) for one in (p, q)]
        lists = [listed(dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))) for top in tops]
        bounds.append(compare(*lists).kl)
    assert all(bound <= exact + 1e-9 for bound in bounds)
    assert bounds[-1] == pytest.approx(exact)
