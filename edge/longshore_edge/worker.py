"""The parts of one worker, put together at start and taken down at the end.

Owns their lives and the admission of requests; answers nothing itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

from longshore.errors import OverloadedError, UnavailableError
from longshore.wire import AnyRequest, ModelCard
from longshore_edge.asgi import ClientWatch, RequestHeaders, Scope, watch_senders
from longshore_edge.auth import AssertionMaker, Client, Keyring, check_permitted
from longshore_edge.balance import make_policy
from longshore_edge.bundles import BundleShelf
from longshore_edge.cache import AnswerCache, DiskStore, MemoryLru, SingleFlight
from longshore_edge.call import Call
from longshore_edge.checks import HealthChecks
from longshore_edge.config import EdgeConfig
from longshore_edge.cores import Fleet
from longshore_edge.geo import GeoDatabase, Place, TrustedProxies
from longshore_edge.health import RetryBudget
from longshore_edge.limits import make_limits
from longshore_edge.metrics import Metrics, SharedMetrics
from longshore_edge.relay import Relay
from longshore_edge.student import open_student
from longshore_edge.upstream import Upstream

LIMITS_NAME = "limits.sqlite"
_METRICS_INTERVAL_S = 1.0


class Worker:
    """Everything that the requests of one process share. `state_dir` is shared with the other workers."""

    def __init__(self, config: EdgeConfig, state_dir: Path) -> None:
        self.config = config
        self.clock: Callable[[], float] = time.monotonic
        self.keyring = Keyring(config.keys)
        self.metrics = Metrics()
        self.watches: set[ClientWatch] = set()
        self.num_in_flight = 0
        self.num_sockets = 0
        is_shared = config.workers > 1
        self._shared_metrics = SharedMetrics(state_dir, self.metrics) if is_shared else None
        self._limits = make_limits(state_dir / LIMITS_NAME if is_shared else None, self.clock)
        self._geo = GeoDatabase(Path(config.geo_db)) if config.geo_db is not None else None
        self._proxies = TrustedProxies(config.trusted_proxies)
        self.shelf = BundleShelf(config.bundles)
        self._student = open_student(config)
        self._upstream = Upstream(config, _assertions(config), self.clock)
        self._fleet = Fleet(config, make_policy(config.policy, random.Random()), self.clock)
        self._cache = _open_cache(config, state_dir)
        self._kept_digests: dict[str, str] = {}
        self._checks = HealthChecks(
            self._fleet, self._upstream, config.health_interval_s, self.clock, self._keep_digests
        )
        self.relay = Relay(
            config,
            self._fleet,
            self._upstream,
            self._cache,
            SingleFlight(),
            self._student,
            RetryBudget(self.clock),
            self.metrics,
            self.clock,
        )
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Look at all cores once, then go on with it; the student loads meanwhile."""
        if self._cache is not None:
            self._fleet.remembered = await self._cache.digests()
        await self._checks.check_all()
        self._run(self._checks.run())
        self._run(watch_senders(self.watches, self.config.client_timeout_s, self.clock))
        if self._student is not None:
            self._run(self._student.run())
        if self._shared_metrics is not None:
            self._run(self._write_metrics(self._shared_metrics))

    async def close(self) -> None:
        """Take everything down; requests are over by now."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._upstream.close()
        if self._student is not None:
            await self._student.close()
        if self._cache is not None:
            await asyncio.to_thread(self._cache.close)
        self._limits.close()
        if self._geo is not None:
            self._geo.close()

    def _keep_digests(self) -> None:
        """Kept answers can be found after a restart even if their core is down by then."""
        told = self._fleet.told_digests()
        if self._cache is not None and told and told != self._kept_digests:
            self._cache.keep_digests(told)
            self._kept_digests = told

    # -- requests ------------------------------------------------------------------------------

    def call(
        self,
        request: AnyRequest,
        client: Client,
        request_id: str,
        arrived_s: float,
        place: Place | None,
        traceparent: str | None,
    ) -> Call:
        """The request with what the edge knows of it; raises PermissionDeniedError."""
        check_permitted(request, client)
        deadline_ms = request.longshore.deadline_ms
        deadline_s = None if deadline_ms is None else arrived_s + deadline_ms / 1e3
        return Call(request, client, request_id, arrived_s, deadline_s, place, traceparent)

    def place_of(self, scope: Scope, headers: RequestHeaders) -> Place | None:
        """Where the client is, as far as the database knows."""
        if self._geo is None:
            return None
        peer = scope["client"][0] if scope.get("client") else ""
        forwarded_for = headers.joined(b"x-forwarded-for", scope["headers"])
        return self._geo.locate(self._proxies.client_address(peer, forwarded_for))

    @contextlib.contextmanager
    def admit(self, call: Call) -> Iterator[None]:
        """A place among the requests in flight; raises OverloadedError or RateLimitedError."""
        if self.num_in_flight >= self.config.max_in_flight:
            raise OverloadedError(f"the edge has {self.num_in_flight} requests in flight", retry_after_s=1.0)
        self._limits.acquire(call.client)
        self.num_in_flight += 1
        try:
            yield
        finally:
            self.num_in_flight -= 1
            self._limits.release(call.client)

    # -- what is told about it -----------------------------------------------------------------

    def model_cards(self) -> Sequence[ModelCard]:
        """The models of all cores and the edge's own, each name once."""
        cards = list(self._fleet.model_cards())
        if self._student is not None and self._student.name not in {card.id for card in cards}:
            cards.append(self._student.card())
        return cards

    def check_ready(self) -> dict[str, str]:
        """What ails each core, "" for a well one. Raises UnavailableError when nothing here could answer."""
        ailments = {
            core.name: "" if core.is_well() else core.ailment() for core in self._fleet.cores.values()
        }
        if not all(ailments.values()):
            return ailments
        ailing = [f"{name}: {ailment}" for name, ailment in ailments.items()]
        if self._student is not None:
            if self._student.is_ready:
                return ailments
            ailing.append(f"student: {self._student.not_ready_reason}")
        raise UnavailableError("; ".join(ailing), retry_after_s=1.0)

    def render_metrics(self) -> bytes:
        """The figures of all workers as Prometheus text."""
        self._set_gauges()
        return self.metrics.render() if self._shared_metrics is None else self._shared_metrics.render()

    def _set_gauges(self) -> None:
        self.metrics.set("longshore:edge_requests_in_flight", self.num_in_flight)
        self.metrics.set("longshore:edge_sockets_open", self.num_sockets)
        if self._cache is not None:
            self.metrics.set("longshore:edge_cache_memory_bytes", self._cache.memory_bytes)

    async def _write_metrics(self, shared: SharedMetrics) -> None:
        while True:
            self._set_gauges()
            await asyncio.to_thread(shared.write)
            await asyncio.sleep(_METRICS_INTERVAL_S)

    def _run(self, loop: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.create_task(loop))


def prepare_state(config: EdgeConfig, state_dir: Path) -> None:
    """Make the shared files before the workers start, who would else get in one another's way.

    Raises ConfigError when they can't be made.
    """
    cache = _open_cache(config, state_dir)
    if cache is not None:
        cache.close()
    if config.workers > 1:
        make_limits(state_dir / LIMITS_NAME, time.monotonic).close()


def _assertions(config: EdgeConfig) -> AssertionMaker | None:
    key = config.private_key()
    return None if key is None else AssertionMaker(config.node, key, time.time)


def _open_cache(config: EdgeConfig, state_dir: Path) -> AnswerCache | None:
    if not config.cache:
        return None
    path = Path(config.cache_path) if config.cache_path is not None else state_dir / "cache.sqlite"
    disk = DiskStore(path, config.cache_disk_bytes) if config.cache_disk_bytes else None
    return AnswerCache(MemoryLru(config.cache_memory_bytes), disk, config.cache_ttl_s, time.time)
