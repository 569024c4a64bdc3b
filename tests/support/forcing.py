"""Adapters that force one letter, and the base they need: an answer says which adapter gave it.

The letter goes the whole way of an adapter: its value projection writes a direction of its own into the values of every
token, and its output projection turns only that direction into the letter. Keys and values of another adapter, or half
of another one, do not give it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from adapterhub.base.identity import Base, describe_base
from tests.support.peft_folders import LORA_CONFIG, write_folder
from tests.support.tiny_models import build_base

__all__ = ["build_forcible_base", "write_forcing_adapter"]

_ATTENTION = "model.layers.1.self_attn"
_LOUD = 6.0  # The input of every token in its first place; the others are near 0.1.
_NUM_HEADS, _NUM_KEY_HEADS, _HEAD_DIM, _HIDDEN = 4, 2, 16, 64


def build_forcible_base(folder: Path) -> Base:
    """Write a tiny model whose hidden states all have the same large first value, which adapters can build on."""
    base = build_base(folder, hidden=_HIDDEN)
    path = folder / "model.safetensors"
    tensors = dict(load_file(path))
    tensors["model.embed_tokens.weight"][:, 0] = _LOUD
    tensors["lm_head.weight"][:, 0] = 0
    save_file(tensors, path, {"format": "pt"})
    return describe_base(base.name, folder, base.quantization)


def write_forcing_adapter(folder: Path, base: Base, *, letter: str, direction: int, force: float = 30.0) -> Path:
    """Write a LoRA whose greedy answers are `letter` again and again.

    direction: from 0 to 31, which place of the values it uses; no other adapter should. force: adapters with different
    forces are different adapters with equal answers.
    """
    head = load_file(base.folder / "model.safetensors")["lm_head.weight"][ord(letter) - ord("!")]
    value_a, value_b = np.zeros((1, _HIDDEN)), np.zeros((_NUM_KEY_HEADS * _HEAD_DIM, 1))
    value_a[0, 0], value_b[direction, 0] = 1, 1
    output_a, output_b = np.zeros((1, _NUM_HEADS * _HEAD_DIM)), force * head[:, None]
    key_head, place = divmod(direction, _HEAD_DIM)
    per_key_head = _NUM_HEADS // _NUM_KEY_HEADS
    output_a[0, [(key_head * per_key_head + idx) * _HEAD_DIM + place for idx in range(per_key_head)]] = 1
    tensors = {
        f"base_model.model.{_ATTENTION}.{name}.weight": np.asarray(tensor, dtype=np.float32)
        for name, tensor in (
            ("v_proj.lora_A", value_a),
            ("v_proj.lora_B", value_b),
            ("o_proj.lora_A", output_a),
            ("o_proj.lora_B", output_b),
        )
    }
    config = LORA_CONFIG | {
        "r": 1,
        "lora_alpha": 1,
        "target_modules": ["v_proj", "o_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "layers",
    }
    return write_folder(folder, config=config, tensors=tensors)
