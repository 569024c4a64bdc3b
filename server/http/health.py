"""Probes: alive (do not restart me), ready (send me requests), started (the base is loaded)."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends
from fastapi.responses import JSONResponse

from server.http.service import Service, get_service

__all__ = ["router"]

router = APIRouter(prefix="/health")


@router.get("/live")
async def live() -> JSONResponse:
    """Answer while the process answers, also while it drains."""
    return JSONResponse({"status": "live"})


@router.get("/ready")
async def ready(service: Annotated[Service, Depends(get_service)]) -> JSONResponse:
    """Answer 200 while new requests are welcome, else 503."""
    if service.is_draining:
        return JSONResponse({"status": "draining"}, 503)
    status = service.engine.status()
    if not status.is_ready:
        return JSONResponse({"status": "not ready"}, 503)
    return JSONResponse({"status": "ready", "running": status.num_running, "waiting": status.num_waiting})


@router.get("/startup")
async def startup(service: Annotated[Service, Depends(get_service)]) -> JSONResponse:
    """Answer 200 once the base is loaded, else 503."""
    is_started = service.engine.status().is_ready or service.is_draining
    return JSONResponse({"status": "started" if is_started else "starting"}, 200 if is_started else 503)
