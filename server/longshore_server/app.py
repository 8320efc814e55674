"""Puts one HTTP worker of the core together: FastAPI with the routes, and the engine's start and end.

Owns no policy; what a route does stands in its own file. granian calls `create_app` with no arguments.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI

from longshore_server.auth import Authenticator
from longshore_server.config import CoreConfig
from longshore_server.engines.base import Engine
from longshore_server.generation import AnswerService
from longshore_server.images import ImageReader
from longshore_server.routes import chat, completions, failing, health, models, stream
from longshore_server.routes import metrics as metrics_route
from longshore_server.routes.deps import Parts
from longshore_server.telemetry.metrics import Metrics
from longshore_server.telemetry.probes import GpuProbe, HostProbe
from longshore_server.text import ModelText

logger = logging.getLogger(__name__)


def create_app(config: CoreConfig | None = None, engine: Engine | None = None) -> FastAPI:
    """The ASGI application of a worker.

    Without arguments both come from the supervisor's handoff. Raises ConfigError where there is none, or
    where the tokenizer can't be read.
    """
    if config is None or engine is None:
        config, engine = _handed_over()
    metrics = Metrics(config.model_name, gpus=GpuProbe(), host=HostProbe())
    parts = Parts(config, engine, Authenticator.of(config), metrics)
    text = ModelText.load(config.tokenizer_dir, template_timeout_s=config.template_timeout_s)
    reader = ImageReader.load(Path(config.model))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        starting = asyncio.create_task(_start_engine(parts, text, reader), name="start-engine")
        try:
            yield
        finally:
            parts.is_draining = True
            starting.cancel()
            await asyncio.wait([starting])
            await engine.close()
            text.close()
            if reader is not None:
                reader.close()

    app = FastAPI(title="Longshore core", lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    app.router.redirect_slashes = False
    app.state.parts = parts
    app.state.drain = parts.drain  # for whoever runs this worker, on SIGTERM
    for module in (chat, completions, models, stream, health, metrics_route):
        app.include_router(module.router)
    failing.install(app, metrics)
    return app


async def _start_engine(parts: Parts, text: ModelText, reader: ImageReader | None) -> None:
    """Wait for the engine beside the routes, so that /healthz and /readyz answer from the first moment."""
    try:
        await parts.engine.start()
    except Exception:
        logger.exception("the engine could not be started")  # /readyz stays false
        return
    parts.service = AnswerService(parts.config, parts.engine, text, parts.metrics, reader=reader)
    parts.has_started.set()


def _handed_over() -> tuple[CoreConfig, Engine]:
    from longshore_server.engines.native import NativeEngineClient
    from longshore_server.handoff import read_handoff

    handoff = read_handoff()
    worker = f"http-{os.getpid()}"
    return handoff.config, NativeEngineClient.from_config(handoff.socket_path, handoff.config, worker=worker)
