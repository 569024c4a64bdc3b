"""The serving digest: the identity of an adapter wherever answers depend on it (slots, caches, metrics, audit)."""

from __future__ import annotations

from collections.abc import Iterable

from adapterhub.peft_format import AdapterConfig
from adapterhub.store.canonical import digest_of
from adapterhub.store.weights import CheckedTensor

__all__ = ["serving_digest"]

_SCHEMA = "adapterhub.serving.v1"


def serving_digest(tensors: Iterable[CheckedTensor], *, config: AdapterConfig, base_digest: str) -> str:
    """sha256 over what changes outputs: tensor bytes, what the configuration means, and the base.

    Metadata, order and padding of the safetensors file, dropout and the like do not enter.
    """
    table = sorted([tensor.name, tensor.dtype, list(tensor.shape), tensor.sha256] for tensor in tensors)
    identity = {"schema": _SCHEMA, "tensors": table, "config": config.canonical(), "base": base_digest}
    return digest_of(identity, what="serving identity")
