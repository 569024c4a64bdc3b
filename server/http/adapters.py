"""From the words of a request to one digest: `adapter` and `model` are resolved once, when the request is admitted.

Knows the store and the base. The request keeps the digest to its end, whatever happens to the name meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pydantic import JsonValue

from adapterhub.base.identity import Base
from adapterhub.errors import AdapterHubError, BaseMismatchError, RequestError, UnsupportedFieldError
from adapterhub.store import Store, Version
from server.engine.types import AdapterHandle, AdapterPart
from server.http.mixes import check_ranks, merge_members, read_weights
from server.http.replies import AdapterInfo, MixMember

__all__ = ["BASE", "AdapterChoice", "AdapterNames"]

BASE = "base"
_MIX = "mix"
_ALLOWED = (
    "Name one adapter: task, task@v3, task@alias, task@sha256:<digest> or base; "
    'or send several, {"mix": {name: weight}}.'
)


@dataclass(frozen=True, slots=True)
class AdapterChoice:
    """What a request runs with. label: `task@vN`, `mix(...)` or the name of the base; handle: None for the base."""

    label: str
    info: AdapterInfo
    handle: AdapterHandle | None

    def headers(self) -> dict[str, str]:
        """Name the adapter in the response headers."""
        if self.handle is None:
            return {"x-adapter-digest": BASE, "x-adapter-version": BASE}
        return {"x-adapter-digest": f"sha256:{self.handle.digest}", "x-adapter-version": self.label}


class AdapterNames:
    """Resolves references against the store, for one base."""

    def __init__(self, store: Store, base: Base) -> None:
        self.store = store
        self._base = base

    async def choose(self, adapter: JsonValue, model: str | None) -> AdapterChoice:
        """Resolve the two fields of a request. The name of the base means the base in `model`, a task in `adapter`.

        adapter: a reference, `{"mix": {reference: weight}}`, or None. Raises UnsupportedFieldError, InvalidNameError,
        AdapterNotFoundError, AliasNotFoundError, BaseMismatchError, and RequestError for a mix that cannot be and when
        both fields name something and they differ.
        """
        if isinstance(adapter, dict):
            choice = await asyncio.to_thread(self.resolve_mix, _only_mix(adapter))
        elif isinstance(adapter, str):
            choice = await self._resolve(adapter, "adapter")
        else:
            return await self._resolve(BASE if model is None else model, "model")
        if model is not None and not self.is_base(model):
            other = await self._resolve(model, "model")
            if other.info.digest != choice.info.digest:
                raise RequestError(
                    f"'adapter' {adapter!r} is {choice.label!r}, but 'model' {model!r} is {other.label!r}.",
                    f"Send one of them; 'model' may always be {self._base.name!r}.",
                ).at("adapter")
        return choice

    def is_base(self, name: str) -> bool:
        """Tell whether `name` in the field `model` means the bare base."""
        return name in (BASE, self._base.name)

    async def _resolve(self, reference: str, param: str) -> AdapterChoice:
        if reference == BASE or (param == "model" and self.is_base(reference)):
            info = AdapterInfo(task=BASE, version=None, digest=None)
            return AdapterChoice(self._base.name, info, None)
        if reference == "auto" or reference.startswith((f"{_MIX}:", "gate:")):
            raise UnsupportedFieldError(f"This server does not know the adapter choice {reference!r}.", _ALLOWED).at(
                param
            )
        try:
            return await asyncio.to_thread(self.resolve, reference)
        except AdapterHubError as error:
            error.at(param)
            raise

    def resolve(self, reference: str) -> AdapterChoice:
        """Look `reference` up in the store. Raises what `Store.get_version` raises, and BaseMismatchError."""
        version = self.store.get_version(reference)
        self.check_base(version)
        handle = AdapterHandle.alone(version.serving_digest, self._opener(version), version.label)
        info = AdapterInfo(task=version.task, version=version.number, digest=f"sha256:{version.serving_digest}")
        return AdapterChoice(version.label, info, handle)

    def resolve_mix(self, mix: JsonValue) -> AdapterChoice:
        """Look every name of a mix up. Raises what `resolve` raises, RequestError and UnsupportedFieldError."""
        named: list[tuple[str, Version, float]] = []
        for name, weight in read_weights(mix).items():
            try:
                version = self.store.get_version(name)
                self.check_base(version)
            except AdapterHubError as error:
                error.at(f"adapter.mix.{name}")
                raise
            named.append((name, version, weight))
        members = sorted(merge_members(named), key=lambda member: (member.version.task, member.version.number))
        if len(members) == 1 and members[0].weight == 1:
            return self.resolve(members[0].version.label)
        check_ranks([self.store.manifest(member.version) for member in members])
        handle = AdapterHandle.mixed(
            AdapterPart(one.version.serving_digest, one.version.label, one.weight, self._opener(one.version))
            for one in members
        )
        info = AdapterInfo(
            task=_MIX,
            version=None,
            digest=f"sha256:{handle.digest}",
            members=[
                MixMember(
                    task=one.version.task,
                    version=one.version.number,
                    digest=f"sha256:{one.version.serving_digest}",
                    weight=one.weight,
                )
                for one in members
            ],
        )
        return AdapterChoice(handle.label, info, handle)

    def _opener(self, version: Version) -> Callable[[], Path]:
        return partial(self.store.view, version.serving_digest)

    def check_base(self, version: Version) -> None:
        """Refuse a version made for another base. Raises BaseMismatchError."""
        if version.base_digest != self._base.digest:
            raise BaseMismatchError(
                f"Adapter {version.label!r} was made for base {version.base_digest[:12]}, "
                f"but this server runs {self._base.name!r} ({self._base.quantization}), {self._base.digest[:12]}.",
                "Serve its base with `hub serve --base B --quantization Q`, or train it again on this one.",
            )


def _only_mix(adapter: dict[str, JsonValue]) -> JsonValue:
    if list(adapter) != [_MIX]:
        raise UnsupportedFieldError(f"The object {adapter!r} is no adapter.", _ALLOWED).at("adapter")
    return adapter[_MIX]
