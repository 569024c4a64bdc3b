"""Compiled norms give the numbers of the norms they replace, and leave alone what they do not compute."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from adapterhub.base.loading import load_model
from server.norms import replace_norms_
from tests.support.kernel_cases import largest_error
from tests.support.native import require_library
from tests.support.tiny_models import FAMILIES, build_base

# Two per layer and one at the end; qwen3 also normalises queries and keys, gemma2 what each half of a layer returns.
NUM_NORMS = dict.fromkeys(FAMILIES, 5) | {"qwen3": 9, "gemma2": 9, "phi": 0}


class OddRMSNorm(nn.Module):
    """Divides by the mean size, not by the root of the mean square."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.eps = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / (x.abs().mean(dim=-1, keepdim=True) + self.eps) * self.weight


@pytest.mark.parametrize("family", FAMILIES)
def test_the_norms_of_a_family_are_replaced_and_answer_as_before(family: str, tmp_path: Path) -> None:
    base = build_base(tmp_path, family)
    model, plain = load_model(base), load_model(base)
    assert replace_norms_(model, require_library()) == NUM_NORMS[family]
    exact = plain.double()
    torch.manual_seed(0)
    with torch.inference_mode():
        for name, norm in exact.named_modules():
            if not type(norm).__name__.endswith("RMSNorm"):
                continue
            width = norm.get_parameter("weight").shape[0]
            for size in (1e-3, 1.0, 1e3):
                x = torch.randn(1, 5, 4, width) * size
                wanted = norm(x.double())
                for laid in (x, x.transpose(1, 2).contiguous().transpose(1, 2)):
                    assert largest_error(model.get_submodule(name)(laid), wanted) < 1e-6


@pytest.mark.parametrize("width", [1, 15, 16, 63, 64, 65, 576])
def test_a_row_is_normalised_alone_to_the_last_bit(width: int) -> None:
    torch.manual_seed(0)
    norm = nn.RMSNorm(width, eps=1e-6).requires_grad_(False)
    norm.weight.copy_(torch.randn(width))
    model = nn.Sequential(norm)
    x = torch.randn(9, width)
    wanted = model.double()(x.double())
    assert replace_norms_(model.float(), require_library()) == 1
    whole = model(x)
    assert largest_error(whole, wanted) < 1e-6
    for row in range(9):
        assert torch.equal(model(x[row : row + 1])[0], whole[row])
    x[4, width // 2] = float("nan")
    found = model(x)
    assert found[4].isnan().all()
    assert torch.equal(found[[0, 8]], whole[[0, 8]])
    assert model(x[:0]).shape == (0, width)


def test_a_norm_of_another_formula_or_without_weight_stays() -> None:
    model = nn.Sequential(OddRMSNorm(), nn.RMSNorm(8, elementwise_affine=False), nn.LayerNorm(8))
    kept = list(model)
    assert replace_norms_(model, require_library()) == 0
    assert list(model) == kept
