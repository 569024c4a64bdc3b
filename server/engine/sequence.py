"""The words of the scheduler: a sequence, what it does in one step, the plan of a step, and how much may run at once.

Knows tokens as numbers; no tensors, names or clients.
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Limits", "Row", "Sequence", "StepPlan"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much at once, and for how long.

    max_sequences: rows of one step. max_step_tokens: tokens of one step; a CPU computes about this many per second with
    a model of 135 million parameters, so a long prompt delays the others' next token by at most that. max_waiting and
    max_waiting_tokens: beyond this the queue is full for tenants that have their share of it. ageing_steps: a sequence
    that has waited so many steps more gains one level of priority. lead_tokens: an adapter in a slot may be served so
    many tokens more than one that waits for a slot, so that requests of one adapter run together. prefix_cache: reuse
    computed blocks. host_adapter_mib: memory of adapters that are in no slot. load_timeout_s: a load that takes longer
    fails.
    """

    max_sequences: int = 32
    max_step_tokens: int = 256
    max_waiting: int = 256
    max_waiting_tokens: int = 1 << 20
    ageing_steps: int = 64
    lead_tokens: int = 512
    prefix_cache: bool = True
    host_adapter_mib: int = 1024
    load_timeout_s: float = 60.0


@dataclass(slots=True, eq=False)
class Sequence:
    """One answer in the making.

    token_ids: prompt and answer so far; tenant, priority: as in the request; max_tokens: most tokens it can have, as
    far as known; num_computed: how many tokens have keys and values; num_cached: prompt tokens taken from the prefix
    cache when it began; hashes: of its full blocks, after the root; level: its priority when it began, age included.
    """

    request_id: str
    digest: str | None
    token_ids: list[int]
    tenant: str = ""
    priority: int = 0
    max_tokens: int = 0
    num_computed: int = 0
    num_cached: int = 0
    block_ids: list[int] = field(default_factory=list[int])
    hashes: list[bytes] = field(default_factory=list[bytes])
    slot: int | None = None
    arrival: int = 0
    arrival_step: int = 0
    level: int = 0

    @property
    def num_left(self) -> int:
        """Tokens whose keys and values are missing; one for a sequence that decodes."""
        return len(self.token_ids) - self.num_computed

    @property
    def num_to_come(self) -> int:
        """Steps it can still take, at most, as far as known."""
        return max(1, self.max_tokens - self.num_computed)


@dataclass(frozen=True, slots=True)
class Row:
    """The next tokens of one sequence.

    start: position of the first; is_sampled: whether they reach the end, so that their logits give a new token.
    """

    sequence: Sequence
    start: int
    token_ids: tuple[int, ...]
    is_sampled: bool


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step.

    writes: (slot, digest) to write before it; missing: digests to load before they can be written; epoch: the number of
    slot writes after which the rows may run, those of the plan included.
    """

    rows: tuple[Row, ...]
    writes: tuple[tuple[int, str], ...]
    missing: tuple[str, ...]
    epoch: int
