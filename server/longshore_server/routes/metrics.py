"""`GET /metrics` in Prometheus' text format; needs a key unless the setting `open_metrics` says otherwise."""

from __future__ import annotations

import asyncio
import logging

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from longshore.errors import LongshoreError
from longshore_server.engines.base import EngineStats
from longshore_server.routes.deps import AppParts, Parts, caller_of
from longshore_server.telemetry.metrics import CONTENT_TYPE

logger = logging.getLogger(__name__)
router = APIRouter()

_STATS_TIMEOUT_S = 2.0


@router.get("/metrics", response_model=None)
async def metrics(request: Request, parts: AppParts) -> Response:
    """The figures of every worker and of the engine."""
    if not parts.config.open_metrics:
        caller_of(request)
    return Response(parts.metrics.export(await _engine_stats(parts)), media_type=CONTENT_TYPE)


async def _engine_stats(parts: Parts) -> EngineStats | None:
    """The engine's figures, or None where it does not answer: a scrape must tell that, not fail of it."""
    if parts.service is None:
        return None
    try:
        async with asyncio.timeout(_STATS_TIMEOUT_S):
            return await parts.engine.stats()
    except (LongshoreError, TimeoutError) as error:
        logger.warning("the engine gave no figures: %s", error)
        return None
