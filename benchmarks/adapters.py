"""Random adapters for measurements, made by PEFT once and kept: the same folders serve PEFT, vLLM and our store.

Random numbers cost what trained ones cost; they are small, so that answers stay text, and different per seed, so that
no two adapters share anything.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from adapterhub.base.identity import Base
from adapterhub.base.loading import load_model
from adapterhub.store import Store
from benchmarks.systems.job import Adapter
from trainer.methods.profiles import VERA_PROJECTION_KEY

__all__ = ["KINDS", "RANKS", "AdapterKind", "adapter_set", "publish_all", "write_missing"]

AdapterKind = Literal["lora", "rslora", "dora", "ia3", "adalora", "vera"]
KINDS: tuple[AdapterKind, ...] = ("lora", "rslora", "dora", "ia3", "adalora", "vera")
RANKS = (8, 16, 32)
_VERA_RANK = 256  # VeRA trains vectors only, so its projections are wide: https://arxiv.org/abs/2310.11454, table 6.
_IA3_TARGETS = ["k_proj", "v_proj", "down_proj"]  # https://arxiv.org/abs/2205.05638, section 3.3
# Size of the random part by tensor: updates a tenth of the base's own output, scales a few percent off one.
_STRENGTH = {"lora_B": 0.02, "ia3_l": 0.05, "lora_E": 0.5, "vera_lambda": 0.05}


def adapter_set(which: Literal["lora", "mixed"], num_adapters: int, *, folder: Path) -> tuple[Adapter, ...]:
    """Name `num_adapters` adapters: LoRA of ranks 8, 16, 32 in turn, or all kinds in turn with those ranks.

    folder: of one base, because DoRA's magnitudes are norms of its weights.
    """
    result: list[Adapter] = []
    for idx in range(num_adapters):
        kind: AdapterKind = "lora" if which == "lora" else KINDS[idx % len(KINDS)]
        rank = RANKS[idx % 3] if which == "lora" else RANKS[(idx + idx // len(KINDS)) % 3]
        rank = {"ia3": 0, "vera": _VERA_RANK}.get(kind, rank)
        name = f"{which}-{idx:03d}-{kind}-r{rank}"
        result.append(Adapter(name=name, folder=str(folder / "adapters" / name), rank=rank))
    return tuple(result)


def write_missing(adapters: Sequence[Adapter], base: Base) -> None:
    """Write the PEFT folders that are not there yet, for the values of `base`. Each appears whole or not at all."""
    missing = [one for one in adapters if not Path(one.folder).is_dir()]
    if not missing:
        return
    plain: Any = load_model(base)  # Before PEFT is imported: it keeps the notices of libraries off the terminal.
    import torch
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT comments on ranks and reads attributes transformers deprecates.
        for adapter in missing:
            _, number, kind, _ = adapter.name.rsplit("-", 3)
            model = get_peft_model(plain, _peft_config(kind, adapter.rank, base))
            _randomize_(model, torch.Generator().manual_seed(int(number)))
            target = Path(adapter.folder)
            scratch = target.with_name(f".{target.name}.tmp")
            model.save_pretrained(str(scratch), save_embedding_layers=False)
            scratch.replace(target)
            plain = model.unload()


def _peft_config(kind: str, rank: int, base: Base) -> Any:
    from peft import AdaLoraConfig, IA3Config, LoraConfig, VeraConfig

    targets = sorted({name.rpartition(".")[2] for name in base.modules})
    match kind:
        case "lora" | "rslora" | "dora":
            flags: dict[str, Any] = {"use_rslora": kind == "rslora", "use_dora": kind == "dora"}
            return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM", **flags)
        case "ia3":
            return IA3Config(target_modules=_IA3_TARGETS, feedforward_modules=["down_proj"], task_type="CAUSAL_LM")
        case "adalora":
            options: dict[str, Any] = {"init_r": rank, "target_r": rank, "total_step": 1000, "lora_alpha": 2 * rank}
            return AdaLoraConfig(target_modules=targets, task_type="CAUSAL_LM", **options)
        case "vera":
            return VeraConfig(
                r=rank, projection_prng_key=VERA_PROJECTION_KEY, target_modules=targets, task_type="CAUSAL_LM"
            )
    raise ValueError(f"kind {kind!r} is none of {KINDS}")


def _randomize_(model: Any, generator: Any) -> None:
    """Fill the trainable tensors with seeded noise: around one for scales, around zero for the rest."""
    import torch

    for name, parameter in model.named_parameters():
        noise = torch.empty_like(parameter.data).normal_(generator=generator)
        size = next((value for key, value in _STRENGTH.items() if key in name), None)
        if "lora_A" in name:
            parameter.data = noise / parameter.shape[-1] ** 0.5
        elif "ia3_l" in name:
            parameter.data = 1 + _STRENGTH["ia3_l"] * noise
        elif size is not None:
            parameter.data = size * noise


def publish_all(adapters: Sequence[Adapter], base: Base, *, home: Path) -> None:
    """Publish the folders into the store of `home`, each as a task of its own; what is there stays."""
    with Store.open(home / "store") as store:
        known = set(store.tasks())
        for adapter in adapters:
            if adapter.name not in known:
                store.publish(Path(adapter.folder), task=adapter.name, base=base, trust_base=True)
