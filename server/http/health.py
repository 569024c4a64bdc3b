"""Probes: alive (do not restart me), ready (send me requests), started (the base is loaded)."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from server.http.service import get_service

__all__ = ["router"]

router = APIRouter(prefix="/health")


@router.get("/live")
async def live(request: Request) -> JSONResponse:
    """Answer 200 while the engine lives, also while it drains; 503 when only a restart helps."""
    if not get_service(request).engine.status().is_alive:
        return JSONResponse({"status": "dead"}, 503)
    return JSONResponse({"status": "live"})


@router.get("/ready")
async def ready(request: Request) -> JSONResponse:
    """Answer 200 while new requests are welcome, else 503."""
    service = get_service(request)
    if service.is_draining:
        return JSONResponse({"status": "draining"}, 503)
    status = service.engine.status()
    if not status.is_ready:
        return JSONResponse({"status": "not ready"}, 503)
    return JSONResponse({"status": "ready", "running": status.num_running, "waiting": status.num_waiting})


@router.get("/startup")
async def startup(request: Request) -> JSONResponse:
    """Answer 200 once the base is loaded, else 503."""
    service = get_service(request)
    is_started = service.engine.status().is_ready or service.is_draining
    return JSONResponse({"status": "started" if is_started else "starting"}, 200 if is_started else 503)
