from __future__ import annotations

from pathlib import Path

import pytest

from adapterhub.base.loading import load_model
from adapterhub.errors import UserInputError
from server.engine.runner import Runner
from tests.support.adapters import METHODS, open_with_peft, write_adapter
from tests.support.rows import Row, decode, expected_logits, prompt
from tests.support.tiny_models import FAMILIES, build_base


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_answers_as_transformers_and_peft_do(family: str, tmp_path: Path) -> None:
    base = build_base(tmp_path / "base", family)
    views = [write_adapter(tmp_path / method, base, method=method, rank=5, as_view=True) for method in METHODS]
    runner = Runner(load_model(base), base, num_slots=len(views), num_blocks=64, block_size=8)
    for slot, view in enumerate(views):
        runner.write_slot(slot, runner.load_adapter(view))
    # Longer than the sliding windows, prompts in one and in two pieces, rows that join while others decode.
    rows = [Row(prompt(6 + 5 * idx, seed=idx), slot=idx - 1, joins_at=idx % 2, pieces=1 + idx % 3) for idx in range(6)]
    decode(runner, rows, num_steps=6)
    for row in rows:
        model = load_model(base)
        if row.slot >= 0:
            model = open_with_peft(model, views[row.slot])
        expected = expected_logits(model, row)
        for found, wanted in zip(row.logits, expected, strict=True):
            assert (found - wanted).abs().max().item() < 1e-4
            assert int(found.argmax()) == int(wanted.argmax())


def test_layers_that_attend_in_an_unknown_way_are_refused(tmp_path: Path) -> None:
    base = build_base(tmp_path)
    model = load_model(base)
    model.config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(UserInputError) as caught:
        Runner(model, base, num_slots=1, num_blocks=1)
    assert str(caught.value) == (
        "The base has layers of type 'chunked_attention', which this server does not compute. "
        "Serve a base whose layers are all 'full_attention' or 'sliding_attention'."
    )


def test_layers_that_look_ahead_are_refused(tmp_path: Path) -> None:
    base = build_base(tmp_path)
    model = load_model(base)
    model.model.layers[1].self_attn.is_causal = False
    with pytest.raises(UserInputError) as caught:
        Runner(model, base, num_slots=1, num_blocks=1)
    assert str(caught.value) == (
        "LlamaAttention attends to later tokens, which this server does not compute. "
        "Serve a model with plain causal attention."
    )


def test_rotary_angles_that_depend_on_the_batch_are_refused(tmp_path: Path) -> None:
    base = build_base(tmp_path)
    model = load_model(base)
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(UserInputError) as caught:
        Runner(model, base, num_slots=1, num_blocks=1)
    assert str(caught.value) == (
        "The base rotates positions by 'dynamic', whose angles depend on the longest row of a batch. "
        "Serve a base with another rope type, such as 'default', 'linear', 'yarn' or 'llama3'."
    )
