"""The identity of computed tokens: a hash of everything their keys and values depend on.

A block's hash covers its own tokens and, through the hash before it, all earlier ones. The chain starts from the base,
the adapter (or mix, or gate) and the tenant, each by digest or identifier and never by a name that can move. Blocks
with equal hashes hold equal keys and values and may be shared.

Source of hashed blocks: https://docs.vllm.ai/en/latest/design/prefix_caching.html. Knows tokens and digests, no blocks.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

__all__ = ["block_hash", "root_hash"]


def root_hash(base_digest: str, *, digest: str | None, tenant: str) -> bytes:
    """Return where the chain of a sequence starts. digest: of the adapter, mix or gate; None for the bare base."""
    fields = (base_digest, digest or "", tenant)
    # Each field is preceded by its length, so that no two lists of fields give the same bytes.
    encoded = (field.encode("utf-8", "surrogatepass") for field in fields)
    return hashlib.sha256(b"".join(len(one).to_bytes(8, "little") + one for one in encoded)).digest()


def block_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Return the hash of a full block. parent: hash of the block before it, or the root; token_ids: its tokens."""
    return hashlib.sha256(parent + array("q", token_ids).tobytes()).digest()
