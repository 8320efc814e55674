"""`GET /healthz` (the process lives) and `GET /readyz` (it can answer); both open, both cheap."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from longshore.wire import dump_json
from longshore_server.routes.deps import AppParts, Parts

router = APIRouter()


@router.get("/healthz", response_model=None)
async def healthz() -> Response:
    """200 as long as this worker runs."""
    return Response(dump_json({"status": "ok"}), media_type="application/json")


@router.get("/readyz", response_model=None)
async def readyz(parts: AppParts) -> Response:
    """200 when a request would be answered, else 503 with the reason."""
    reason = _why_not(parts)
    if reason is None:
        return Response(dump_json({"status": "ready"}), media_type="application/json")
    body = dump_json({"status": "unavailable", "reason": reason})
    return Response(body, 503, {"retry-after": "1"}, "application/json")


def _why_not(parts: Parts) -> str | None:
    if parts.is_draining:
        return "shutting down"
    if parts.service is None:
        return "the engine is starting"
    return None if parts.engine.is_ready() else "the engine is not ready"
