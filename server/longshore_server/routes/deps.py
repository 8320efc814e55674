"""What routes need of the app: its parts, and the rule that every route of a router asks who is calling."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import Annotated, cast

from fastapi import APIRouter, Depends
from starlette.requests import HTTPConnection

from longshore.errors import UnavailableError
from longshore_server.auth import Authenticator, Caller
from longshore_server.config import CoreConfig
from longshore_server.engines.base import Engine
from longshore_server.generation import AnswerService
from longshore_server.routes.socket import SocketSession
from longshore_server.telemetry.metrics import Metrics

_START_WAIT_S = 1.0  # covers a worker that is a moment behind its siblings; a model that loads takes longer
_GOODBYE_S = 1.0  # of the draining time, for telling clients whose answers were not finished


@dataclass(slots=True)
class Parts:
    """The parts of one worker. `service` is None until the engine has told what model it holds."""

    config: CoreConfig
    engine: Engine
    authenticator: Authenticator
    metrics: Metrics
    service: AnswerService | None = None
    is_draining: bool = False
    has_started: asyncio.Event = field(default_factory=asyncio.Event)
    sockets: set[SocketSession] = field(default_factory=set)

    async def drain(self) -> None:
        """End this worker's work in good order, within `drain_timeout_s`; /readyz is false from here on."""
        self.is_draining = True
        timeout_s = self.config.drain_timeout_s
        if self.service is not None:
            await self.service.drain(max(timeout_s - _GOODBYE_S, timeout_s / 2))
        for session in tuple(self.sockets):
            await session.say_goodbye()


def parts_of(connection: HTTPConnection) -> Parts:
    """The parts of the app that serves this connection."""
    return cast(Parts, connection.app.state.parts)


def caller_of(connection: HTTPConnection) -> Caller:
    """Who is calling; raises AuthenticationError."""
    return parts_of(connection).authenticator.caller(connection)


KnownCaller = Annotated[Caller, Depends(caller_of)]
AppParts = Annotated[Parts, Depends(parts_of)]


def protected_router() -> APIRouter:
    """A router all of whose routes refuse an unknown caller, whether they look at who it is or not."""
    return APIRouter(dependencies=[Depends(caller_of)])


async def service_of(connection: HTTPConnection) -> AnswerService:
    """The service that answers; raises UnavailableError while the engine starts and while the core drains."""
    parts = parts_of(connection)
    if parts.is_draining:
        raise UnavailableError("this core is shutting down", retry_after_s=parts.config.drain_timeout_s)
    if parts.service is None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(parts.has_started.wait(), _START_WAIT_S)
    if parts.service is None:
        raise UnavailableError("the engine is starting", retry_after_s=2.0)
    return parts.service


Service = Annotated[AnswerService, Depends(service_of)]
