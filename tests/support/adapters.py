"""Random adapters of every method, made and saved by PEFT itself: the reference the product is measured against."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftConfig, PeftModel, VeraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from adapterhub.base.identity import Base
from adapterhub.base.loading import quiet_libraries

__all__ = ["METHODS", "open_with_peft", "write_adapter"]

METHODS = ("lora", "dora", "ia3", "adalora", "vera")
_IA3_TARGETS = {"k_proj", "v_proj", "qkv_proj", "down_proj", "fc2"}
_IA3_FEEDFORWARD = {"down_proj", "fc2"}


@contextmanager
def _peft_notices_ignored() -> Iterator[None]:
    """PEFT reads attributes that transformers has deprecated, and comments on ranks; neither is ours to correct."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _config(base: Base, method: str, rank: int, peft_config: dict[str, Any]) -> PeftConfig:
    leaves = {name.rpartition(".")[2] for name in base.modules}
    options = {"target_modules": sorted(leaves), "task_type": "CAUSAL_LM"} | peft_config
    match method:
        case "lora" | "dora":
            return LoraConfig(r=rank, use_dora=method == "dora", **({"lora_alpha": 2 * rank} | options))
        case "ia3":
            defaults = {
                "target_modules": sorted(leaves & _IA3_TARGETS),
                "feedforward_modules": sorted(leaves & _IA3_FEEDFORWARD),
            }
            return IA3Config(**({"task_type": "CAUSAL_LM"} | defaults | options))
        case "adalora":
            return AdaLoraConfig(
                init_r=rank, target_r=max(1, rank // 2), total_step=100, **({"lora_alpha": 16} | options)
            )
        case "vera":
            return VeraConfig(r=rank, **({"vera_dropout": 0.0} | options))
    raise ValueError(f"method {method!r} is none of {METHODS}")


def _randomize(model: torch.nn.Module, strength: float) -> None:
    """Give every adapter tensor values that move the logits well above rounding, yet keep them finite."""
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        noise = noise if "lora_A" in name else strength * noise
        if "lora_A" in name:
            parameter.data = noise / parameter.shape[-1] ** 0.5
        elif "lora_B" in name:
            parameter.data = 0.3 * noise / parameter.shape[-1] ** 0.5
        elif "magnitude" in name:
            parameter.data = parameter.data * (1 + 0.2 * noise)
        elif "ia3_l" in name:
            parameter.data = 1 + 0.3 * noise
        elif "lora_E" in name:
            parameter.data = noise
        elif "vera_lambda" in name:
            parameter.data = 0.5 * noise


def _prune(model: Any) -> None:
    """Drop ranks at random, a different number per module, as AdaLoRA does at the end of its schedule."""
    config = model.peft_config["default"]
    config.rank_pattern = {
        re.sub(r"^base_model\.model\.|\.default$", "", name): (torch.rand(parameter.shape[0]) < 0.6).tolist()
        for name, parameter in model.named_parameters()
        if "lora_E" in name
    }


def write_adapter(
    folder: Path,
    base: Base,
    *,
    method: str,
    rank: int = 8,
    seed: int = 0,
    pruned: bool = False,
    strength: float = 1.0,
    as_view: bool = False,
    plain: PreTrainedModel | None = None,
    **peft_config: Any,
) -> Path:
    """Save a PEFT adapter with random, non-zero weights over `base` into `folder` and return the folder.

    pruned: AdaLoRA only, write a checkpoint whose ranks were cut. strength: how far the adapter moves the base; a deep
    model with wild adapters amplifies rounding errors. as_view: also write `adapterhub.json` with the base digest, as
    the store's views have it. plain: the base, already loaded; it is given back as it was. peft_config: options of the
    method's PEFT config; the default targets are all linears (for IA3 the key, value and down projections).
    """
    quiet_libraries()
    with torch.random.fork_rng(devices=[]), _peft_notices_ignored():
        torch.manual_seed(seed)
        if plain is None:
            plain = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32, local_files_only=True)
        model = get_peft_model(plain, _config(base, method, rank, peft_config))
        _randomize(model, strength)
        if pruned:
            _prune(model)
        model.save_pretrained(folder, save_embedding_layers=False)
        model.unload()
    if as_view:
        (folder / "adapterhub.json").write_text(json.dumps({"base_digest": base.digest}), encoding="utf-8")
    return folder


def open_with_peft(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Put the saved adapter on `model`, which is changed in place, in eval mode: what one row must equal."""
    with _peft_notices_ignored():
        return PeftModel.from_pretrained(model, folder).eval()
