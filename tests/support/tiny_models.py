"""Small random base models on disk, in Hugging Face layout, each with a byte-level tokenizer and a chat template.

Knows transformers. The models answer nonsense, but quickly and always the same for the same seed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from adapterhub.base.identity import Base, describe_base
from adapterhub.base.loading import quiet_libraries
from adapterhub.settings import Quantization

__all__ = ["FAMILIES", "VOCAB_SIZE", "build_base", "byte_tokenizer"]

_SPECIAL_TOKENS = ("<|pad|>", "<|im_start|>", "<|im_end|>")
VOCAB_SIZE = 256 + len(_SPECIAL_TOKENS)
_CONTEXT_TOKENS = 512
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What each family adds to the shared shape; the windows are short so that small tests reach over their edge.
_EXTRAS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": 8},
    "gemma": {"head_dim": 16},
    "gemma2": {
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "attn_logit_softcapping": 1.0,
        "final_logit_softcapping": 5.0,
    },
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {},
}
FAMILIES = tuple(_EXTRAS)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, then the special tokens; no merges, so nothing was trained."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={char: idx for idx, char in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=_CONTEXT_TOKENS,
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def build_base(
    folder: Path,
    family: str = "llama",
    *,
    seed: int = 0,
    hidden: int = 64,
    layers: int = 2,
    quantization: Quantization = "none",
) -> Base:
    """Write a random model of `family` (one of FAMILIES) with grouped-query attention into `folder` and describe it."""
    quiet_libraries()
    tokenizer = byte_tokenizer()
    config = AutoConfig.for_model(
        family,
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=_CONTEXT_TOKENS,
        bos_token_id=tokenizer.convert_tokens_to_ids("<|im_start|>"),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **_EXTRAS[family],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():  # The usual 0.02 gives nearly flat logits; wrong maths would hide in them.
            noise = torch.randn_like(parameter)
            parameter.data = noise / parameter.shape[1] ** 0.5 if parameter.dim() == 2 else parameter.data + 0.1 * noise
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return describe_base(f"tiny-{family}", folder, quantization)
