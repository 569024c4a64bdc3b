"""Decoder layers of Llama's shape run in a few compiled calls; what they compute is what transformers computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from adapterhub.base.loading import load_model
from server.engine.attention import ATTENTION_NAME, AttentionProbe, register_paged_attention
from server.engine.fused_layers import fuse_layers_
from server.kernels import load_kernel
from server.layers import wrap_linears
from server.norms import replace_norms_
from server.products import Compute, pick_products
from server.step_context import StepContext, step_context
from tests.support.kernel_cases import largest_error
from tests.support.native import require_library
from tests.support.tiny_models import FAMILIES, build_base

# qwen3 normalises queries and keys, gemma has another activation, gemma2 more norms; phi and phi3 have other parts.
FUSED = dict.fromkeys(FAMILIES, 0) | {"llama": 2, "qwen2": 2, "mistral": 2}


def prepare(folder: Path, family: str, *, compute: Compute = "float32", hidden: int = 64) -> PreTrainedModel:
    """Return a model as the runner has it before it fuses layers."""
    base = build_base(folder, family, hidden=hidden)
    model = load_model(base)
    products = pick_products(compute, device="cpu")
    wrap_linears(model, base.modules, num_slots=1, kernel=load_kernel("native"), build_product=products)
    replace_norms_(model, require_library())
    register_paged_attention()
    model.set_attn_implementation(ATTENTION_NAME)
    return model


@torch.inference_mode()
def hidden_states(model: PreTrainedModel, token_ids: list[int]) -> Tensor:
    positions = torch.arange(3, 3 + len(token_ids))[None]
    with step_context(StepContext(None, AttentionProbe())):
        body: Any = model.get_decoder()
        return body(input_ids=torch.tensor([token_ids]), position_ids=positions, use_cache=False).last_hidden_state


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_llamas_shape_are_fused_and_answer_as_before(family: str, tmp_path: Path) -> None:
    model = prepare(tmp_path, family)
    token_ids = [7, 250, 3, 3, 90, 12, 0, 31, 8]
    before = hidden_states(model, token_ids)
    assert fuse_layers_(model, require_library(), compute="float32") == FUSED[family]
    assert largest_error(hidden_states(model, token_ids), before.double()) < 1e-5
    if FUSED[family]:  # A row is computed alone, however many there are.
        assert torch.equal(hidden_states(model, token_ids[:1])[0, 0], hidden_states(model, token_ids)[0, 0])


def test_layers_are_fused_in_int8(tmp_path: Path) -> None:
    model = prepare(tmp_path, "llama", compute="int8")
    before = hidden_states(model, [5, 6, 7])
    assert fuse_layers_(model, require_library(), compute="int8") == 2
    assert largest_error(hidden_states(model, [5, 6, 7]), before.double()) < 1e-2


def test_a_layer_with_another_formula_stays_as_it_is(tmp_path: Path) -> None:
    model = prepare(tmp_path, "llama")
    body: Any = model.get_decoder()
    odd = body.layers[1]
    inner = odd.mlp.forward
    odd.mlp.forward = lambda x: inner(x) * 1.001
    wanted = hidden_states(model, [5, 6, 7])
    assert fuse_layers_(model, require_library(), compute="float32") == 1
    assert largest_error(hidden_states(model, [5, 6, 7]), wanted.double()) < 1e-5
    odd.mlp.forward = lambda x: inner(x) * 0
    assert largest_error(hidden_states(model, [5, 6, 7]), wanted.double()) > 1e-3


@pytest.mark.parametrize("width", [1, 15, 16, 17, 100])
def test_the_gated_activation_is_that_of_float64(width: int) -> None:
    library = require_library()
    x = torch.randn(9, 2 * width) * torch.logspace(-3, 2, 9)[:, None]
    x[0, 0], x[1, 0], x[2, 0], x[3, 0] = 0.0, 1e30, -1e30, -200.0
    gate, up = x.double().split(width, dim=1)
    wanted = torch.nn.functional.silu(gate) * up
    y = torch.empty(9, width)
    library.silu_product(y.data_ptr(), x.data_ptr(), 9, width, 2)
    assert torch.allclose(y.double(), wanted, rtol=1e-6, atol=1e-33)
    x[4, width - 1] = float("nan")
    library.silu_product(y.data_ptr(), x.data_ptr(), 9, width, 2)
    assert y[4, -1].isnan()
    assert y[5:].isfinite().all()


@pytest.mark.parametrize(("dim", "rotary_dim"), [(16, 16), (64, 64), (24, 8)])
def test_rotation_turns_pairs_by_their_angles_and_leaves_the_rest(dim: int, rotary_dim: int) -> None:
    num_rows, num_heads, spare = 11, 3, 5
    x = torch.randn(num_rows, num_heads * dim + spare)
    angles = torch.rand(num_rows, rotary_dim // 2, dtype=torch.float64) * 6
    # A complex product turns a pair; the pairs are the halves of the rotated part.
    heads = x[:, :-spare].double().view(num_rows, num_heads, dim)
    first, second = heads[..., : rotary_dim // 2], heads[..., rotary_dim // 2 : rotary_dim]
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)[:, None]
    wanted = torch.cat([turned.real, turned.imag, heads[..., rotary_dim:]], dim=-1).flatten(1)
    tables = [torch.cat([one, one], dim=1).float().contiguous() for one in (angles.cos(), angles.sin())]
    untouched = x[:, -spare:].clone()
    pointers = (x.data_ptr(), tables[0].data_ptr(), tables[1].data_ptr())
    require_library().rotate(*pointers, num_rows, num_heads, dim, rotary_dim, x.stride(0), 2)
    assert largest_error(x[:, :-spare], wanted) < 1e-6
    assert torch.equal(x[:, -spare:], untouched)
