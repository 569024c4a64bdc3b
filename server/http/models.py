"""`/v1/models`: every name a request may use."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request

from adapterhub.errors import AdapterHubError
from adapterhub.store import Version
from server.http.replies import ModelCard, ModelList
from server.http.service import Service, get_service

__all__ = ["router"]

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> ModelList:
    """List the base, the tasks, and all versions made for this base."""
    return ModelList(data=await asyncio.to_thread(_list_cards, get_service(request)))


@router.get("/v1/models/{name:path}")
async def get_model(name: str, request: Request) -> ModelCard:
    """Describe one name."""
    return await asyncio.to_thread(_get_card, get_service(request), name)


def _base_card(service: Service) -> ModelCard:
    return ModelCard(id=service.base.name, created=0, root=service.base.name, digest=f"sha256:{service.base.digest}")


def _card(service: Service, name: str, version: Version, aliases: list[str]) -> ModelCard:
    return ModelCard(
        id=name,
        created=int(version.created_at.timestamp()),
        root=service.base.name,
        parent=service.base.name,
        digest=f"sha256:{version.serving_digest}",
        aliases=aliases,
    )


def _list_cards(service: Service) -> list[ModelCard]:
    store = service.adapters.store
    pointing: dict[str, list[str]] = {}
    for alias in store.aliases():
        pointing.setdefault(alias.version_label, []).append(alias.label)
    cards = [_base_card(service)]
    for version in store.versions():
        if version.base_digest != service.base.digest:
            continue
        aliases = pointing.get(version.label, [])
        if f"{version.task}@stable" in aliases:
            cards.append(_card(service, version.task, version, aliases))
        cards.append(_card(service, version.label, version, aliases))
    return cards


def _get_card(service: Service, name: str) -> ModelCard:
    if service.adapters.is_base(name):
        return _base_card(service)
    store = service.adapters.store
    try:
        version = store.get_version(name)
        service.adapters.check_base(version)
    except AdapterHubError as error:
        error.at("model")
        raise
    aliases = [one.label for one in store.aliases(version.task) if one.version_label == version.label]
    return _card(service, name, version, aliases)
