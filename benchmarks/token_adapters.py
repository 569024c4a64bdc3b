"""LoRA adapters that each answer with one token, again and again, so that an answer names the adapter that gave it.

The last layer's attention output has a component common to all positions, its mean direction m. With A = m / |m|^2 in
the first rank and B a large multiple of what the output head reads as one token, that token wins whatever the prompt.
The other ranks and the query and value projections hold faint noise: they cost what a real adapter of that rank costs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from adapterhub.base.identity import Base
from adapterhub.base.loading import load_model, load_tokenizer
from adapterhub.errors import UserInputError

__all__ = ["TokenAdapters"]

_RANKS = (4, 8)
_PUSH = 100.0  # Times the usual length of a hidden state: what it held before becomes one percent of it.
_CLEAR = 0.9  # Of a word's own logit, the most another may have: a nearer one can win in some contexts.
_NOISE = 1e-4
_CHUNK = 512  # Candidates compared with the whole vocabulary at once: 100 MB of products.


@dataclass(frozen=True, slots=True)
class TokenAdapters:
    """Writes adapters for one base.

    words: (token id, its text) of every adapter to be; reader: (H,) first row of A; pushes: (N, H) unit vectors, one
    for each word; length: usual length of a hidden state.
    """

    base: Base
    words: tuple[tuple[int, str], ...]
    reader: Tensor
    pushes: Tensor
    length: float

    @classmethod
    def of(cls, base: Base, prompts: Sequence[Sequence[int]], *, num_adapters: int) -> TokenAdapters:
        """Look at the last layer's activations over some prompts. Raises UserInputError for too many adapters."""
        model: Any = load_model(base)
        inputs: list[Tensor] = []
        hidden: list[Tensor] = []
        layer = model.model.layers[-1]
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, given: inputs.append(given[0][0]))
        layer.register_forward_hook(lambda _, __, out: hidden.append(out[0] if isinstance(out, tuple) else out))
        for prompt in prompts:
            model(input_ids=torch.tensor([list(prompt)]))
        mean = torch.cat(inputs).mean(dim=0)
        length = float(torch.cat([one.reshape(-1, one.shape[-1]) for one in hidden]).norm(dim=-1).median())
        head, gain = model.lm_head.weight.data, model.model.norm.weight.data
        words = _forcible(head, gain, load_tokenizer(base), num_wanted=num_adapters)
        pushes = _directions(head[[token_id for token_id, _ in words]], gain)
        return cls(base, tuple(words), mean / mean.dot(mean), pushes, length)

    def write(self, folder: Path, *, idx: int, seed: int) -> None:
        """Write the PEFT folder of the adapter that answers with word number `idx`."""
        generator = torch.Generator().manual_seed(seed)
        rank = _RANKS[idx % len(_RANKS)]
        last = self._modules("o_proj")[-1]
        names = [*self._modules("q_proj"), *self._modules("v_proj"), last]
        tensors: dict[str, Tensor] = {}
        for name in names:
            num_out, num_in = self.base.modules[name]
            a = _NOISE * torch.randn(rank, num_in, generator=generator)
            b = _NOISE * torch.randn(num_out, rank, generator=generator)
            if name == last:
                a[0], b[:, 0] = self.reader, _PUSH * self.length * self.pushes[idx]
            tensors[f"base_model.model.{name}.lora_A.weight"] = a
            tensors[f"base_model.model.{name}.lora_B.weight"] = b
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "target_modules": names}
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})

    def _modules(self, leaf: str) -> list[str]:
        found = [name for name in self.base.modules if name.endswith(f".{leaf}")]
        return sorted(found, key=lambda name: int(name.split(".")[2]))


def _forcible(head: Tensor, gain: Tensor, tokenizer: Any, *, num_wanted: int) -> list[tuple[int, str]]:
    """Return tokens, with their texts, that read as words and win against all others when pushed.

    head: (V, H) output head; gain: (H,) weight of the norm before it.
    """
    words = [(token_id, str(tokenizer.decode([token_id]))) for token_id in range(len(head))]
    words = [(token_id, text) for token_id, text in words if text.strip().isalpha() and text.isascii()]
    found: list[tuple[int, str]] = []
    for first in range(0, len(words), _CHUNK):
        chunk = words[first : first + _CHUNK]
        pushed = _directions(head[[token_id for token_id, _ in chunk]], gain) * gain
        best = (pushed @ head.T).topk(2, dim=-1)
        is_clear = best.values[:, 1] <= _CLEAR * best.values[:, 0]
        winners = best.indices[:, 0].masked_fill(~is_clear, -1).tolist()
        found += [word for word, winner in zip(chunk, winners, strict=True) if word[0] == winner]
        if len(found) >= num_wanted:
            return found[:num_wanted]
    raise UserInputError(
        f"{num_wanted} adapters are wanted, but only {len(found)} tokens of this base can be forced.",
        f"Ask for at most {len(found)} with --adapters.",
    )


def _directions(rows: Tensor, gain: Tensor) -> Tensor:
    """Unit vectors that the norm's gain turns parallel to rows of the head."""
    return torch.nn.functional.normalize(rows / gain, dim=-1)
