"""PEFT adapter folders written with numpy alone, and the base they fit: quick enough to publish hundreds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from adapterhub.base.identity import Base

__all__ = ["LORA_CONFIG", "MODULES", "lora_tensors", "small_base", "write_folder"]

_Q, _V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
MODULES: dict[str, tuple[int, int]] = {_Q: (8, 8), _V: (4, 8), "model.layers.0.mlp.down_proj": (8, 16)}
LORA_CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj", "v_proj"],
}


def small_base(name: str = "small", digest: str = "b" * 64) -> Base:
    """A base that exists in name only: the store needs its identity and its module shapes."""
    return Base(
        name=name,
        folder=Path("/nonexistent"),
        quantization="none",
        digest=digest,
        chat_template_digest="c" * 64,
        context_tokens=64,
        modules=MODULES,
    )


def lora_tensors(seed: int = 0, rank: int = 2) -> dict[str, np.ndarray]:
    """Float32 tensors of a LoRA on the query and value projections of MODULES."""
    random = np.random.default_rng(seed)
    result: dict[str, np.ndarray] = {}
    for module in (_Q, _V):
        num_out, num_in = MODULES[module]
        prefix = f"base_model.model.{module}"
        result[f"{prefix}.lora_A.weight"] = random.standard_normal((rank, num_in), dtype=np.float32)
        result[f"{prefix}.lora_B.weight"] = random.standard_normal((num_out, rank), dtype=np.float32)
    return result


def write_folder(
    folder: Path,
    *,
    seed: int = 0,
    config: Mapping[str, Any] = LORA_CONFIG,
    tensors: Mapping[str, np.ndarray] | None = None,
    metadata: dict[str, str] | None = None,
) -> Path:
    """Write an adapter folder and return it; equal arguments give equal bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(dict(tensors or lora_tensors(seed)), folder / "adapter_model.safetensors", metadata or {"format": "pt"})
    return folder
