"""The frozen random projections that VeRA adapters share: one resident copy per key, rank, shape and device.

Knows how PEFT draws them. Source: https://arxiv.org/abs/2310.11454, section 3.2, and PEFT 0.21.2, tuners/vera/model.py:
Kaiming-uniform from a CPU generator seeded with the key, A first, then B.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from adapterhub.peft_format import SHARED_VERA_A, SHARED_VERA_B, AdapterConfig
from server.kernels import by_columns

__all__ = ["Projections", "resident_projections"]

_Key = tuple[int, int, int, int, torch.device]
# Holds what the arguments alone determine, and only while an adapter uses it; so it is shared by the whole process.
_RESIDENT: weakref.WeakValueDictionary[_Key, Projections] = weakref.WeakValueDictionary()
_LOCK = threading.Lock()


class Projections:
    """A (R, widest H) and B (widest O, R), and the views on them that modules of one size share."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        self.a = a
        self.b = by_columns(b)
        self._views: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def views(self, num_out: int, num_in: int) -> tuple[Tensor, Tensor]:
        """Return A (R, H) and B (O, R) for a module; the same objects on every call, so that kernels can group rows."""
        return self._views.setdefault((num_out, num_in), (self.a[:, :num_in], self.b[:num_out]))


def resident_projections(
    config: AdapterConfig, tensors: Mapping[str, Tensor], *, sizes: Sequence[tuple[int, int]]
) -> Projections:
    """Return the projections of a VeRA adapter: those drawn from its key, or its own when its file holds others.

    tensors: the tensors of the file, float32; sizes: (O, H) of every module the adapter changes.
    """
    assert config.rank is not None
    assert config.projection_prng_key is not None
    widest_out, widest_in = max(size[0] for size in sizes), max(size[1] for size in sizes)
    device = next(iter(tensors.values())).device
    key = (config.projection_prng_key, config.rank, widest_out, widest_in, device)
    with _LOCK:
        drawn = _RESIDENT.get(key) or _draw(*key)
        a, b = tensors.get(SHARED_VERA_A), tensors.get(SHARED_VERA_B)
        if a is not None and b is not None and not (torch.equal(a, drawn.a) and torch.equal(b, drawn.b)):
            return Projections(a, b)
        _RESIDENT[key] = drawn
        return drawn


def _draw(prng_key: int, rank: int, widest_out: int, widest_in: int, device: torch.device) -> Projections:
    generator = torch.Generator(device="cpu").manual_seed(prng_key)

    def kaiming_uniform(num_rows: int, num_columns: int) -> Tensor:
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(num_columns))
        return torch.empty(num_rows, num_columns).uniform_(-bound, bound, generator=generator).to(device)

    a = kaiming_uniform(rank, widest_in)
    return Projections(a, kaiming_uniform(widest_out, rank))
