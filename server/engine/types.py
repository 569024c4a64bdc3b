"""What the HTTP layer and an engine say to each other. Knows no tensors, names, files or HTTP."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, Self

import rfc8785

from adapterhub.errors import AdapterHubError
from adapterhub.records import EffectReport

__all__ = [
    "MAX_STACKED_RANK",
    "AdapterHandle",
    "AdapterPart",
    "Engine",
    "EngineStatus",
    "ErrorEvent",
    "Event",
    "FinishEvent",
    "FinishReason",
    "GenerateRequest",
    "OutputRule",
    "SamplingParams",
    "Tier",
    "TokenEvent",
    "TokenLogprob",
    "TokenScore",
]

FinishReason = Literal["stop", "length", "cancelled"]
Tier = Literal["device", "host"]

# Ranks side by side in one linear. Rank 1024 costs as much as a dense 1024-wide linear; more is no adapter any more.
MAX_STACKED_RANK = 1024


@dataclass(frozen=True, slots=True)
class OutputRule:
    """What the whole answer must be. text: the JSON schema or the regular expression; empty for any JSON object."""

    kind: Literal["json_schema", "json_object", "regex"]
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the answer is drawn.

    temperature: 0 means greedy. top_p: share of the probability to draw from. top_k: number of best tokens to draw
    from, 0 for all. min_p: smallest probability to draw from, as a share of the best token's. repetition_penalty:
    divides what speaks for a token of the prompt or the answer, 1 for none. presence_penalty, frequency_penalty: taken
    from the logit of a token of the answer, once and per occurrence. seed: any text; None draws a fresh one. stop:
    strings that end the answer and are not part of it. logprobs: None for none, otherwise the number of alternatives
    reported beside each chosen token. output: None for free text. ignore_eos: go on after the token that ends an
    answer, up to max_tokens; for measurements.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: str | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    output: OutputRule | None = None
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class AdapterPart:
    """One published adapter and the factor on what it adds. digest: serving digest; label: for people only.

    open_view: checks its PEFT folder, or builds it, and names it. Takes a while; called whenever the adapter is loaded,
    in the thread that loads it.
    """

    digest: str
    label: str
    weight: float
    open_view: Callable[[], Path]


@dataclass(frozen=True, slots=True)
class AdapterHandle:
    """What a request runs with: one published adapter, or a weighted mix of several.

    digest: the identity, of the adapter or of the mix; label: for people only; parts: sorted by digest, each digest
    once.
    """

    digest: str
    label: str
    parts: tuple[AdapterPart, ...]

    @classmethod
    def alone(cls, digest: str, open_view: Callable[[], Path], label: str) -> Self:
        """One adapter as it was published."""
        return cls(digest, label, (AdapterPart(digest, label, 1.0, open_view),))

    @classmethod
    def mixed(cls, parts: Iterable[AdapterPart]) -> Self:
        """The weighted sum of adapters with distinct digests; one part of weight 1 is that adapter.

        The digest of a mix is sha256 over the canonical JSON (RFC 8785) of its [digest, weight] pairs, sorted.
        """
        ordered = tuple(sorted(parts, key=lambda part: part.digest))
        if len(ordered) == 1 and ordered[0].weight == 1:
            return cls(ordered[0].digest, ordered[0].label, ordered)
        pairs = rfc8785.dumps([[part.digest, part.weight] for part in ordered])
        named = sorted(f"{part.label}:{rfc8785.dumps(part.weight).decode()}" for part in ordered)
        return cls(hashlib.sha256(pairs).hexdigest(), f"mix({','.join(named)})", ordered)

    @property
    def is_mix(self) -> bool:
        """Whether loading takes more than opening one published adapter."""
        return len(self.parts) != 1 or any(part.weight != 1 for part in self.parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """One answer to generate. adapter: None means the bare base.

    tenant: who asks; tenants share the engine fairly and never share computed prompts. priority: lower runs earlier.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    adapter: AdapterHandle | None
    sampling: SamplingParams
    tenant: str = ""
    priority: int = 0


@dataclass(frozen=True, slots=True)
class TokenScore:
    """One token of the vocabulary. raw: its bytes, which need not be whole characters; logprob: natural logarithm."""

    token_id: int
    text: str
    raw: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The chosen token and its best alternatives, best first."""

    chosen: TokenScore
    top: tuple[TokenScore, ...]


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One generated token. The texts of all events of a request, joined, are its answer.

    text: may be empty (half a character, the possible beginning of a stop string, a special token) and may hold text
    that earlier tokens held back. logprob: None unless asked for, and for the token that ends the answer. offset: where
    the token begins, in whole characters of the answer.
    """

    text: str
    token_id: int
    logprob: TokenLogprob | None = None
    offset: int = 0


@dataclass(frozen=True, slots=True)
class FinishEvent:
    """The answer is complete.

    num_completion_tokens counts token events, the ending token included; num_cached_tokens: prompt tokens that were not
    computed, because an earlier request had computed them.
    """

    reason: FinishReason
    num_prompt_tokens: int
    num_completion_tokens: int
    num_cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class ErrorEvent:
    """The request failed; tokens sent before are not a complete answer."""

    error: AdapterHubError


Event = TokenEvent | FinishEvent | ErrorEvent


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatus:
    """What probes and admission look at.

    is_alive: false once the engine died of a mistake, so that only a restart helps; retry_after_s: when a refused
    caller may try again, from the measured rate; num_cached_prompt_tokens: prompt tokens taken from the prefix cache so
    far.
    """

    is_ready: bool
    is_alive: bool = True
    num_running: int
    num_waiting: int
    retry_after_s: int
    num_cached_prompt_tokens: int = 0


class Engine(Protocol):
    """Generates answers. Implemented by `NativeEngine` and, for tests, by `FakeEngine`."""

    @property
    def context_tokens(self) -> int:
        """Longest prompt plus answer of one request."""
        ...

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """Yield token events and then exactly one FinishEvent or ErrorEvent. Closing the generator cancels the request.

        Raises OverloadedError before the first event when the queue is full or the engine is not running.
        """
        ...

    async def load(self, handle: AdapterHandle) -> None:
        """Bring an adapter close to the device before anyone asks for it.

        Raises AdapterLoadError, and OverloadedError when the engine is not running.
        """
        ...

    async def measure(self, handle: AdapterHandle) -> EffectReport | None:
        """Load an adapter and say how much it changes the base; None for a mix. Raises what `load` raises."""
        ...

    async def unload(self, digest: str) -> bool:
        """Forget an adapter on the device and on the host, unless a request uses it. Return whether it is gone."""
        ...

    async def start(self) -> None:
        """Begin to work; a second call does nothing."""
        ...

    async def stop(self) -> None:
        """End every request in flight with an ErrorEvent and stop; a second call does nothing."""
        ...

    def resident(self) -> list[str]:
        """Digests that are on the device or on the host."""
        ...

    def residency(self) -> dict[str, Tier]:
        """Return the tier of each resident digest."""
        ...

    def status(self) -> EngineStatus:
        """Say how busy the engine is."""
        ...
