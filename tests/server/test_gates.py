"""Gates of a row, per token and decoder layer, against the experts added up by hand in float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from adapterhub.base.identity import Base
from adapterhub.base.loading import load_model
from server.engine.loader import LoadedAdapter
from server.engine.mix import load_experts
from server.engine.runner import Runner, StepRow
from tests.support.adapters import write_adapter
from tests.support.kernel_cases import CPU_KERNELS
from tests.support.rows import prompt
from tests.support.tiny_models import build_base

EXPERTS = (
    {"method": "lora", "rank": 5},
    {"method": "adalora", "rank": 8, "seed": 1},
    {"method": "vera", "rank": 16, "seed": 2},
    {"method": "lora", "rank": 3, "seed": 3, "target_modules": ["v_proj", "down_proj"]},
)
NUM_LAYERS, NUM_BLOCKS, BLOCK_TOKENS = 2, 40, 4
PIECES = (7, 6, 1, 1, 1)  # A prompt in two pieces, then three tokens.
NUM_TOKENS = sum(PIECES)
BOUND = 1e-4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return build_base(tmp_path_factory.mktemp("base"), "qwen2", layers=NUM_LAYERS)


@pytest.fixture(scope="module")
def views(base: Base, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("views")
    return [write_adapter(folder / f"{idx}", base, as_view=True, **spec) for idx, spec in enumerate(EXPERTS)]


@pytest.fixture(params=CPU_KERNELS)
def runner(request: pytest.FixtureRequest, base: Base, views: Sequence[Path]) -> Runner:
    """Slot 0 holds all experts, slot 1 the first alone, slot 2 the first two as experts."""
    runner = Runner(
        load_model(base), base, num_slots=3, num_blocks=NUM_BLOCKS, block_size=BLOCK_TOKENS, kernel=request.param
    )
    runner.write_slot(0, load_experts(views, base, runner.model))
    runner.write_slot(1, runner.load_adapter(views[0]))
    runner.write_slot(2, load_experts(views[:2], base, runner.model))
    return runner


def random_gates(num_experts: int = len(EXPERTS), *, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return torch.rand(NUM_TOKENS, NUM_LAYERS, num_experts)


def run(runner: Runner, rows: Sequence[tuple[int, Tensor | None]]) -> Tensor:
    """Run rows (slot, gates) with different tokens through all pieces; return (rows, pieces, V)."""
    size = NUM_BLOCKS // 4
    found: list[Tensor] = []
    start = 0
    for piece in PIECES:
        span = slice(start, start + piece)
        planned = [
            StepRow(
                tuple(row_tokens(slot)[span]),
                start,
                tuple(range((slot + 1) * size, (slot + 2) * size)),
                slot,
                None if gates is None else gates[span],
            )
            for slot, gates in rows
        ]
        found.append(runner.step(planned, epoch=runner.epoch))
        start += piece
    return torch.stack(found, dim=1)


def row_tokens(slot: int) -> list[int]:
    return prompt(NUM_TOKENS, seed=slot + 1)


@contextmanager
def experts_added(model: nn.Module, adapter: LoadedAdapter, gates: Tensor) -> Iterator[None]:
    """Let every linear of a float64 model return W x + bias + sum over experts of gate * B A x, for one row."""

    def hook_for(name: str):
        weights = adapter.modules[name]
        assert weights.a is not None
        assert weights.b is not None
        assert weights.expert_of_rank is not None
        a, b, expert_of_rank = weights.a.double(), weights.b.double(), weights.expert_of_rank
        gate = gates[:, int(name.split(".")[2])].double()

        def hook(_layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            parts = [
                gate[:, [expert]] * (inputs[0] @ a[expert_of_rank == expert].t() @ b[:, expert_of_rank == expert].t())
                for expert in range(gate.shape[1])
            ]
            return output + sum(parts)

        return hook

    handles = [model.get_submodule(name).register_forward_hook(hook_for(name)) for name in adapter.modules]
    yield
    for handle in handles:
        handle.remove()


def exact(base: Base, adapter: LoadedAdapter | None, gates: Tensor, *, slot: int) -> Tensor:
    """What the row says after each piece, (pieces, V) float64."""
    model = load_model(base).double()
    ends = torch.tensor(PIECES).cumsum(0) - 1
    with torch.inference_mode():
        if adapter is None:
            return model(input_ids=torch.tensor([row_tokens(slot)])).logits[0, ends]
        with experts_added(model, adapter, gates):
            return model(input_ids=torch.tensor([row_tokens(slot)])).logits[0, ends]


def test_a_gated_row_adds_its_experts_as_its_gates_say(runner: Runner, base: Base, views: Sequence[Path]) -> None:
    gates = random_gates()
    adapter = load_experts(views, base, load_model(base))
    [found] = run(runner, [(0, gates)])
    assert (found - exact(base, adapter, gates, slot=0)).abs().max() < BOUND
    assert (found - exact(base, adapter, gates.flip(1), slot=0)).abs().max() > 100 * BOUND, "the layers matter"
    assert (found - exact(base, adapter, gates.flip(0), slot=0)).abs().max() > 100 * BOUND, "the tokens matter"


def test_gates_of_one_and_of_none_are_the_sum_of_the_experts_and_the_base(
    runner: Runner, base: Base, views: Sequence[Path]
) -> None:
    [ones], [plain] = run(runner, [(0, torch.ones(NUM_TOKENS, NUM_LAYERS, len(EXPERTS)))]), run(runner, [(0, None)])
    assert torch.equal(ones, plain)
    runner.write_slot(0, runner.load_mix([(view, 1.0) for view in views]))
    [mixed] = run(runner, [(0, None)])
    assert (ones - mixed).abs().max() < BOUND
    runner.write_slot(0, load_experts(views, base, runner.model))
    zeros = torch.zeros(NUM_TOKENS, NUM_LAYERS, len(EXPERTS))
    [nothing] = run(runner, [(0, zeros)])
    assert (nothing - exact(base, None, zeros, slot=0)).abs().max() < BOUND


def test_a_gate_chooses_one_expert(runner: Runner) -> None:
    only_first = torch.zeros(NUM_TOKENS, NUM_LAYERS, len(EXPERTS))
    only_first[:, :, 0] = 1
    [gated] = run(runner, [(0, only_first)])
    size = NUM_BLOCKS // 4
    alone = [
        runner.step([StepRow(tuple(row_tokens(0)[:end]), 0, tuple(range(size)), 1)], epoch=runner.epoch)[0]
        for end in torch.tensor(PIECES).cumsum(0).tolist()
    ]
    assert (gated - torch.stack(alone)).abs().max() < BOUND


def test_rows_beside_a_gated_row_keep_every_bit(runner: Runner) -> None:
    """Rows of the base, of a plain adapter, and of another number of experts."""
    gates, narrow = random_gates(), random_gates(2, seed=1)
    together = run(runner, [(0, gates), (1, None), (-1, None), (2, narrow)])
    rows: list[tuple[int, Tensor | None]] = [(0, gates), (1, None), (-1, None), (2, narrow)]
    for row, found in zip(rows, together, strict=True):
        [alone] = run(runner, [row])
        assert torch.equal(found, alone)


def test_experts_without_gates_get_ones_beside_a_gated_row(runner: Runner) -> None:
    [alone] = run(runner, [(2, None)])
    _, beside = run(runner, [(0, random_gates()), (2, None)])
    assert torch.equal(beside, alone)
