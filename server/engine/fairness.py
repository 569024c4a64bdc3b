"""Who is next: waiting sequences in fair order, by priority with age, tenant, adapter and arrival.

Each tenant, and each adapter of a tenant, has a virtual token counter (Fairness in Serving Large Language Models,
https://arxiv.org/abs/2401.00588): the tokens it was served. The least served comes first. One that comes back after a
pause is lifted to the least of those who wait, so that nobody saves up. Adapters in a slot may lead by a fixed number
of tokens, which keeps requests of one adapter together.

Promise: of two tenants that both have sequences waiting all the time, neither is served more than
`2 * (lead_tokens + most that the rows of one step can still use)` tokens more than the other; the same holds for two
adapters of a tenant. Knows counters, no slots, blocks and tensors.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Iterator
from heapq import heappop, heappush
from itertools import count
from typing import Generic, TypeVar

from server.engine.sequence import Sequence

__all__ = ["FairQueue"]

# A generated token takes a pass of its own and counts as two of a prompt, as in the paper, section 5.1.
_OUTPUT_WEIGHT = 2
# Counters of those who neither wait nor owe anything are dropped beyond this number.
_MAX_IDLE_COUNTERS = 1024

_K = TypeVar("_K")


class _Counters(Generic[_K]):
    """Tokens served per client, and who waits.

    A client that comes back is lifted to the least served of those who wait; if nobody waits, to who waited last.
    """

    def __init__(self) -> None:
        self.served: dict[_K, int] = {}
        self._num_waiting: Counter[_K] = Counter()
        self._last: _K | None = None

    def join(self, client: _K) -> None:
        """Note one more waiting sequence of a client; its first one lifts the counter."""
        if not self._num_waiting[client]:
            self.served[client] = max(self.served.get(client, 0), self._floor())
        self._num_waiting[client] += 1

    def leave(self, client: _K) -> None:
        """Note one waiting sequence less."""
        self._last = client
        self._num_waiting[client] -= 1
        if not self._num_waiting[client]:
            del self._num_waiting[client]
        if len(self.served) > _MAX_IDLE_COUNTERS + 2 * len(self._num_waiting):
            floor = self._floor()
            self.served = {
                one: tokens
                for one, tokens in self.served.items()
                if one in self._num_waiting or one == client or tokens > floor
            }

    def _floor(self) -> int:
        waiting = [self.served[one] for one, number in self._num_waiting.items() if number]
        return min(waiting) if waiting else self.served.get(self._last, 0) if self._last is not None else 0

    def charge(self, client: _K, tokens: int) -> None:
        """Count what a client was served."""
        self.served[client] = self.served.get(client, 0) + tokens


class FairQueue:
    """The waiting sequences, and what everyone was served.

    lead_tokens, ageing_steps: as in `server.engine.sequence.Limits`.
    """

    def __init__(self, *, lead_tokens: int, ageing_steps: int) -> None:
        self._lead_tokens = lead_tokens
        self._ageing_steps = ageing_steps
        self._waiting: dict[Sequence, None] = {}
        self._tenants: _Counters[str] = _Counters()
        self._adapters: defaultdict[str, _Counters[str | None]] = defaultdict(_Counters)
        self._arrivals = count(1)
        self._step = 0

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def num_counters(self) -> int:
        """Counters kept, of those who wait and those who left."""
        return len(self._tenants.served) + sum(len(one.served) for one in self._adapters.values())

    def __iter__(self) -> Iterator[Sequence]:
        """Iterate over a copy, in no particular order."""
        return iter(list(self._waiting))

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait; one that was preempted keeps its age."""
        if not sequence.arrival:
            sequence.arrival, sequence.arrival_step = next(self._arrivals), self._step
        self._waiting[sequence] = None
        self._tenants.join(sequence.tenant)
        self._adapters[sequence.tenant].join(sequence.digest)

    def remove(self, sequence: Sequence) -> None:
        """Let a sequence wait no longer."""
        del self._waiting[sequence]
        self._adapters[sequence.tenant].leave(sequence.digest)
        self._tenants.leave(sequence.tenant)
        if len(self._adapters) > len(self._tenants.served):
            self._adapters = defaultdict(
                _Counters, {one: kept for one, kept in self._adapters.items() if one in self._tenants.served}
            )

    def charge(self, sequence: Sequence, *, num_prompt: int = 0, num_output: int = 0) -> None:
        """Count tokens served to a sequence."""
        tokens = num_prompt + _OUTPUT_WEIGHT * num_output
        self._tenants.charge(sequence.tenant, tokens)
        self._adapters[sequence.tenant].charge(sequence.digest, tokens)

    def tick(self) -> None:
        """Let everyone who waits grow older by a step."""
        self._step += 1

    def in_order(self, resident: Container[str]) -> Iterator[Sequence]:
        """Yield the waiting sequences, next first; what is charged or removed meanwhile counts at once.

        resident: adapters in a slot. The best level is shared by all who aged to it, so age never beats fairness.
        """
        best = min((one.priority for one in self._waiting), default=0)
        tenants: defaultdict[str, defaultdict[str | None, list[Sequence]]] = defaultdict(lambda: defaultdict(list))
        for sequence in self._waiting:
            sequence.level = max(best, sequence.priority - (self._step - sequence.arrival_step) // self._ageing_steps)
            tenants[sequence.tenant][sequence.digest].append(sequence)

        def lead(sequence: Sequence) -> int:
            return self._lead_tokens if sequence.digest is None or sequence.digest in resident else 0

        def tenant_rank(sequence: Sequence) -> tuple[int, ...]:
            return (*_urgency(sequence), self._tenants.served[sequence.tenant] - lead(sequence), sequence.arrival)

        def adapter_rank(sequence: Sequence) -> tuple[int, ...]:
            served = self._adapters[sequence.tenant].served[sequence.digest]
            return (*_urgency(sequence), served - lead(sequence), sequence.arrival)

        def line(adapters: dict[str | None, list[Sequence]]) -> Iterator[Sequence]:
            return _merge([sorted(one, key=_place) for one in adapters.values()], adapter_rank)

        yield from _merge([line(adapters) for adapters in tenants.values()], tenant_rank)


def _urgency(sequence: Sequence) -> tuple[int, bool]:
    """What counts before fairness: the level, and having begun already (a preempted sequence holds a slot)."""
    return sequence.level, sequence.slot is None


def _place(sequence: Sequence) -> tuple[int, bool, int]:
    """What counts among the sequences of one adapter."""
    return sequence.level, sequence.slot is None, sequence.arrival


def _merge(lines: Iterable[Iterable[Sequence]], rank: Callable[[Sequence], tuple[int, ...]]) -> Iterator[Sequence]:
    """Yield all of the lines, each in its own order, the lowest head first. Ranks differ and only ever rise."""
    heads: list[tuple[tuple[int, ...], Sequence, Iterator[Sequence]]] = []

    def push(line: Iterator[Sequence]) -> None:
        head = next(line, None)
        if head is not None:
            heappush(heads, (rank(head), head, line))

    for line in lines:
        push(iter(line))
    while heads:
        old_rank, head, line = heappop(heads)
        new_rank = rank(head)
        if new_rank > old_rank:
            heappush(heads, (new_rank, head, line))
        else:
            yield head
            push(line)
