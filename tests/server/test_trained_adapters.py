"""A trained update reaches the answers unchanged, from trainer through store and view to server.

Oracle: the trained model itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adapterhub.base.identity import Base
from adapterhub.base.loading import load_model, load_tokenizer
from adapterhub.store import Store
from server.engine.runner import Runner
from tests.support.adapters import open_with_peft, write_adapter
from tests.support.rows import Row, decode, expected_logits, prompt
from tests.support.tiny_models import build_base
from tests.support.training import echo_rows, tiny_recipe
from trainer.loop import train
from trainer.run import save_adapter

NUM_STEPS = 6


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return build_base(tmp_path_factory.mktemp("base"), quantization="nf4")


def served(store: Store, reference: str, base: Base) -> Row:
    """Greedy tokens and logits of a published version, out of a batch with base rows and another prompt."""
    runner = Runner(load_model(base), base, num_slots=2, num_blocks=64)
    runner.write_slot(1, runner.load_adapter(store.view(store.get_version(reference).serving_digest)))
    row = Row(prompt(9, seed=1), slot=1)
    decode(runner, [Row(prompt(5, seed=2), slot=-1), row, Row(prompt(13, seed=3), slot=1)], num_steps=NUM_STEPS)
    return row


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("lora", {"training__rank": 5}),
        ("lora", {"training__rank": 7, "training__alpha": 3.0, "training__rank_stabilized": True}),
        ("dora", {"training__rank": 3}),
        ("ia3", {}),
        ("adalora", {"training__rank": 3}),
        ("vera", {"training__rank": 9}),
    ],
)
def test_what_was_trained_is_what_is_served(tmp_path: Path, base: Base, method: str, changes: dict[str, Any]) -> None:
    tokenizer = load_tokenizer(base)
    recipe = tiny_recipe(method, training__max_steps=12, **changes)
    result = train(
        load_model(base), echo_rows(tokenizer), recipe=recipe, base=base, tokenizer=tokenizer, run_folder=tmp_path
    )
    folder = save_adapter(result.model, tmp_path / "adapter", base=base)
    with Store.open(tmp_path / "store") as store:
        store.publish(folder, task="tiny", base=base)
        row = served(store, "tiny", base)
    expected = expected_logits(result.model, row)
    assert torch.stack(row.logits).sub(expected).abs().max() < 1e-4
    with result.model.disable_adapter():
        assert expected_logits(result.model, row).sub(expected).abs().max() > 1e-3, "the adapter must matter"


@pytest.mark.parametrize("use_rslora", [False, True])
def test_ranks_and_strengths_that_differ_by_module_survive_the_store(
    tmp_path: Path, base: Base, use_rslora: bool
) -> None:
    patterns = {
        "rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\.down_proj": 11},
        "alpha_pattern": {"k_proj": 1, r"layers\.0\.mlp\.up_proj": 40},
    }
    folder = write_adapter(tmp_path / "peft", base, method="lora", rank=5, use_rslora=use_rslora, **patterns)
    with Store.open(tmp_path / "store") as store:
        store.publish(folder, task="patterned", base=base, trust_base=True)
        row = served(store, "patterned", base)
        exported = store.export("patterned@v1", tmp_path / "exported")
    for source in (folder, exported):
        expected = expected_logits(open_with_peft(load_model(base), source), row)
        assert torch.stack(row.logits).sub(expected).abs().max() < 1e-4
