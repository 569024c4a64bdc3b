"""Build the native engine for a base: load the model, size the key-value memory, wrap the linears; log the choices."""

from __future__ import annotations

import logging

from transformers import PretrainedConfig

from adapterhub.base.identity import Base
from adapterhub.base.loading import load_model, load_tokenizer
from adapterhub.errors import UserInputError
from server.engine.engine import NativeEngine
from server.engine.runner import Runner
from server.engine.sequence import Limits
from server.products import Compute

__all__ = ["block_bytes", "build_engine", "num_blocks_within"]

_log = logging.getLogger(__name__)
_BLOCK_TOKENS = 16
_MIN_TOKENS = 256  # Less does not hold a short conversation.
_FLOAT_BYTES = 4


def build_engine(
    base: Base, *, num_slots: int, kv_memory_mib: int, compute: Compute = "float32", limits: Limits | None = None
) -> NativeEngine:
    """Load the base and build an engine that is not started yet.

    compute: see `server.products.pick_products`. Raises UserInputError for too small a memory, and for int8 where it
    cannot be computed.
    """
    limits = limits or Limits()
    model = load_model(base)
    num_blocks = num_blocks_within(kv_memory_mib, model.config, base, limits)
    runner = Runner(model, base, num_slots=num_slots, num_blocks=num_blocks, block_size=_BLOCK_TOKENS, compute=compute)
    _log.info(
        "base %s (%s, %s), computed in %s: %d slots; keys and values of %d tokens in %.0f MiB",
        base.name,
        base.quantization,
        base.digest[:12],
        compute,
        num_slots,
        num_blocks * _BLOCK_TOKENS,
        num_blocks * block_bytes(model.config) / 2**20,
    )
    engine = NativeEngine(runner, load_tokenizer(base), base, limits=limits)
    if engine.context_tokens < base.context_tokens:
        _log.warning(
            "requests are limited to %d of the base's %d tokens; raise --kv-memory-mib to allow more",
            engine.context_tokens,
            base.context_tokens,
        )
    return engine


def block_bytes(config: PretrainedConfig) -> int:
    """Bytes of one block: keys and values of every layer, float32."""
    text = config.get_text_config()
    num_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * num_heads * head_dim * _FLOAT_BYTES * _BLOCK_TOKENS


def num_blocks_within(kv_memory_mib: int, config: PretrainedConfig, base: Base, limits: Limits) -> int:
    """Blocks that fit into the memory, and no more than all rows with the longest context can use."""
    most = limits.max_sequences * -(-base.context_tokens // _BLOCK_TOKENS)
    num_blocks = min(most, kv_memory_mib * 2**20 // block_bytes(config))
    if num_blocks * _BLOCK_TOKENS < min(_MIN_TOKENS, base.context_tokens):
        needed_mib = -(-_MIN_TOKENS // _BLOCK_TOKENS * block_bytes(config) // 2**20)
        raise UserInputError(
            f"{kv_memory_mib} MiB hold the keys and values of {num_blocks * _BLOCK_TOKENS} tokens of {base.name!r}.",
            f"Give at least {needed_mib} with --kv-memory-mib.",
        )
    return num_blocks
