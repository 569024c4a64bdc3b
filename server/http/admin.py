"""`/admin/v1/adapters`: what is loaded, load or unload one now, and what it does to the base.

There are no keys yet: the server listens on loopback only, so whoever reaches it may do this.
"""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from pydantic import BaseModel

from adapterhub.base.prompts import text_token_ids
from adapterhub.errors import AdapterHubError, ConflictError, NotFoundError, RequestError
from adapterhub.records import EffectReport
from server.engine.probe import PROBE_PROMPT, probe
from server.engine.types import AdapterHandle, Tier
from server.http.adapters import BASE
from server.http.service import Service, get_service

__all__ = ["AdapterEffect", "AdapterResidency", "Residency", "UnloadedAdapter", "router"]

router = APIRouter(prefix="/admin/v1/adapters")


class AdapterResidency(BaseModel):
    """One adapter or mix that is loaded. labels: versions with that digest; none for a mix."""

    digest: str
    tier: Tier
    labels: list[str]


class Residency(BaseModel):
    """Everything that is loaded."""

    data: list[AdapterResidency]


class AdapterEffect(BaseModel):
    """One version and what it does to the base."""

    adapter: str
    digest: str
    effect: EffectReport


class UnloadedAdapter(BaseModel):
    """One version that is neither in a slot nor on the host."""

    adapter: str
    digest: str


@router.get("")
async def list_resident(request: Request) -> Residency:
    """List what is in a slot of the device or on the host."""
    service = get_service(request)
    return await asyncio.to_thread(_list_resident, service)


@router.post("/{ref}/load")
async def load_adapter(ref: str, request: Request) -> AdapterEffect:
    """Load an adapter, measure what it does, probe it against the base, and keep the report."""
    service = get_service(request)
    handle = await asyncio.to_thread(_resolve, service, ref)
    report = await service.engine.measure(handle)
    if report is None:
        raise RequestError(f"This engine does not measure adapters such as {ref!r}.", "Use `hub serve`.").at("ref")
    prompt = await service.tokenize(lambda tokenizer: text_token_ids(tokenizer, PROBE_PROMPT))
    report = report.model_copy(update={"probe": await probe(service.engine, handle, prompt)})
    await asyncio.to_thread(service.adapters.store.record_effect, handle.digest, report)
    return _effect(handle, report)


@router.post("/{ref}/unload")
async def unload_adapter(ref: str, request: Request) -> UnloadedAdapter:
    """Forget an adapter on the device and on the host; one that is not loaded is no error. It stays published."""
    service = get_service(request)
    handle = await asyncio.to_thread(_resolve, service, ref)
    if not await service.engine.unload(handle.digest):
        raise ConflictError(
            f"Adapter {handle.label!r} stays loaded: requests use it or wait for it.",
            "Try again when they have ended.",
        ).at("ref")
    return UnloadedAdapter(adapter=handle.label, digest=f"sha256:{handle.digest}")


@router.get("/{ref}/effect")
async def get_effect(ref: str, request: Request) -> AdapterEffect:
    """Return the report of the last load by `POST .../load`, here or in an earlier life of this store's servers."""
    service = get_service(request)
    handle = await asyncio.to_thread(_resolve, service, ref)
    report = await asyncio.to_thread(service.adapters.store.find_effect, handle.digest)
    if report is None:
        raise NotFoundError(
            f"The effect of {handle.label!r} has not been measured yet.",
            f"Load it with POST /admin/v1/adapters/{handle.label}/load.",
        ).at("ref")
    return _effect(handle, report)


def _list_resident(service: Service) -> Residency:
    labels: dict[str, list[str]] = {}
    for version in service.adapters.store.versions():
        labels.setdefault(version.serving_digest, []).append(version.label)
    data = [
        AdapterResidency(digest=f"sha256:{digest}", tier=tier, labels=labels.get(digest, []))
        for digest, tier in sorted(service.engine.residency().items())
    ]
    return Residency(data=data)


def _resolve(service: Service, ref: str) -> AdapterHandle:
    if ref == BASE:
        raise RequestError(f"{ref!r} is always loaded.", "Name an adapter.").at("ref")
    try:
        handle = service.adapters.resolve(ref).handle
    except AdapterHubError as error:
        error.at("ref")
        raise
    assert handle is not None
    return handle


def _effect(handle: AdapterHandle, report: EffectReport) -> AdapterEffect:
    return AdapterEffect(adapter=handle.label, digest=f"sha256:{handle.digest}", effect=report)
