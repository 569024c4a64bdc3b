"""Which of several kept things is worth least: GreedyDual-Size-Frequency.

Source: Cherkasova, Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching Policy, HP Labs report
HPL-98-69R1, 1998, https://www.hpl.hp.com/techreports/98/HPL-98-69R1.html. The worth of a thing is

    clock + uses * cost / size

clock is the worth of what went last, so that what was used often long ago is overtaken in time. Knows keys and numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count
from typing import Generic, TypeVar

__all__ = ["GreedyDual"]

_K = TypeVar("_K")


@dataclass(slots=True)
class _Worth:
    cost: float
    size: float
    num_uses: int = 0
    value: float = 0.0
    last_used: int = 0


class GreedyDual(Generic[_K]):
    """Remembers uses, costs and sizes. Equal worth: the one unused for longest goes first."""

    def __init__(self) -> None:
        self._worth: dict[_K, _Worth] = {}
        self._clock = 0.0
        self._uses = count(1)

    def add(self, key: _K, *, cost: float, size: float) -> None:
        """Begin to keep something, or correct its cost (of getting it again) and size; units as the caller likes."""
        worth = self._worth.setdefault(key, _Worth(cost, size))
        worth.cost, worth.size = cost, max(size, 1.0)
        self._revalue(worth)

    def use(self, key: _K) -> None:
        """Count a use of something kept."""
        worth = self._worth[key]
        worth.num_uses += 1
        self._revalue(worth)

    def remove(self, key: _K) -> None:
        """Keep something no longer."""
        del self._worth[key]

    def worst(self, keys: Iterable[_K]) -> _K:
        """Return the one of `keys` that is worth least."""
        return min(keys, key=lambda key: (self._worth[key].value, self._worth[key].last_used))

    def evict(self, key: _K) -> None:
        """Keep something no longer to make room, and move the clock on to its worth."""
        self._clock = max(self._clock, self._worth.pop(key).value)

    def _revalue(self, worth: _Worth) -> None:
        worth.value = self._clock + worth.num_uses * worth.cost / worth.size
        worth.last_used = next(self._uses)
