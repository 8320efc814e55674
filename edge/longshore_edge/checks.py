"""Active checks: asks every core at an interval whether it is ready and what it serves.

Updates `cores.Core`; passive health (the breaker) is fed by the relay.
"""

from __future__ import annotations

import asyncio
import sys
import traceback
from collections.abc import Callable
from typing import Any

from longshore.errors import ConnectionFailedError, LongshoreError
from longshore.wire import ModelList, decode
from longshore_edge.auth import Client
from longshore_edge.cores import Core, Fleet
from longshore_edge.upstream import Upstream

CHECKER = Client("longshore-edge-checks", best_lane="batch")
_NUM_SILENT = 2


class HealthChecks:
    """The loop over all cores of one worker."""

    def __init__(
        self,
        fleet: Fleet,
        upstream: Upstream,
        interval_s: float,
        clock: Callable[[], float],
        on_round: Callable[[], None],
    ) -> None:
        """`on_round` is called after each round of checks."""
        self._fleet = fleet
        self._upstream = upstream
        self._interval_s = interval_s
        self._clock = clock
        self._on_round = on_round
        self._num_silent: dict[str, int] = {}

    async def run(self) -> None:
        """Check until cancelled, whatever a round meets."""
        while True:
            await asyncio.sleep(self._interval_s)
            try:
                await self.check_all()
            except Exception:  # a bug of ours must not end the checks
                traceback.print_exc(file=sys.stderr)

    async def check_all(self) -> None:
        """Check every core once, together; never raises for what a core does."""
        await asyncio.gather(*(self._check(core) for core in self._fleet.cores.values()))
        self._on_round()

    async def _check(self, core: Core) -> None:
        try:
            status, body = await self._upstream.get_json(core, "/readyz")
        except LongshoreError as error:
            self._note_silence(core, error)
            return
        self._num_silent[core.name] = 0
        core.is_ready = status in (200, 404)  # a server without /readyz is taken to be ready
        core.not_ready_reason = "" if core.is_ready else f"/readyz answered {status}: {_words(body)}"
        if core.is_ready:
            core.breaker.hint_ready()
            await self._read_models(core)

    def _note_silence(self, core: Core, error: LongshoreError) -> None:
        """A refused connection is sure; a check that got no answer in time may only have met a busy core."""
        self._num_silent[core.name] = self._num_silent.get(core.name, 0) + 1
        if isinstance(error, ConnectionFailedError) or self._num_silent[core.name] >= _NUM_SILENT:
            core.is_ready = False
            core.not_ready_reason = error.message

    async def _read_models(self, core: Core) -> None:
        try:
            status, body = await self._upstream.get_json(core, "/v1/models", CHECKER)
            if status != 200:
                raise LongshoreError(f"/v1/models answered {status}")
            models = decode(ModelList, body, lenient=True)
        except LongshoreError as error:
            core.not_ready_reason = error.message
            return
        core.models = {card.id: card for card in models.data[:1000]}
        core.models_read_s = self._clock()


def _words(body: Any) -> str:
    """The reason in a /readyz body, if it has one."""
    if isinstance(body, dict):
        error = body.get("error")
        reason = error.get("message") if isinstance(error, dict) else body.get("reason")
        if isinstance(reason, str):
            return reason[:200]
    return "not ready"
