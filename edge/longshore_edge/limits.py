"""Per-tenant limits on requests at once and per minute, right with one worker and with several.

One worker counts in memory; several share one SQLite file. Tenants without limits cost nothing.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from longshore.errors import OverloadedError, RateLimitedError
from longshore_edge.auth import Client

_BUSY_TIMEOUT_S = 2.0
_CONCURRENCY_RETRY_S = 1.0


class Limits(Protocol):
    """Takes a place for a request of `client` or raises RateLimitedError; `release` gives it back."""

    def acquire(self, client: Client) -> None: ...

    def release(self, client: Client) -> None: ...

    def close(self) -> None: ...


def make_limits(path: Path | None, clock: Callable[[], float]) -> Limits:
    """Shared limits in the file `path`, or this process's own. `clock` is monotonic, in seconds."""
    return MemoryLimits(clock) if path is None else SharedLimits(path, clock)


def _refilled(tokens: float, updated_s: float, now_s: float, per_minute: int) -> float:
    """A bucket of `per_minute` tokens that refills evenly; a clock that went back refills nothing."""
    return min(float(per_minute), tokens + max(0.0, now_s - updated_s) * per_minute / 60.0)


def _too_many_at_once(client: Client) -> RateLimitedError:
    return RateLimitedError(
        f"the key permits {client.max_concurrency} requests at once", retry_after_s=_CONCURRENCY_RETRY_S
    )


def _too_fast(client: Client, tokens: float) -> RateLimitedError:
    per_minute = client.requests_per_minute or 1
    wait_s = (1.0 - tokens) * 60.0 / per_minute
    return RateLimitedError(f"the key permits {per_minute} requests a minute", retry_after_s=round(wait_s, 3))


class MemoryLimits:
    """Limits of a single worker; the maps hold one entry per tenant of the settings."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._in_flight: dict[str, int] = {}
        self._buckets: dict[str, tuple[float, float]] = {}

    def acquire(self, client: Client) -> None:
        in_flight = self._in_flight.get(client.tenant, 0)
        if client.max_concurrency is not None and in_flight >= client.max_concurrency:
            raise _too_many_at_once(client)
        if client.requests_per_minute is not None:
            self._take_token(client, client.requests_per_minute)
        if client.max_concurrency is not None:
            self._in_flight[client.tenant] = in_flight + 1

    def release(self, client: Client) -> None:
        if client.max_concurrency is not None:
            self._in_flight[client.tenant] -= 1

    def close(self) -> None:
        self._in_flight.clear()

    def _take_token(self, client: Client, per_minute: int) -> None:
        now_s = self._clock()
        tokens, updated_s = self._buckets.get(client.tenant, (float(per_minute), now_s))
        tokens = _refilled(tokens, updated_s, now_s, per_minute)
        if tokens < 1.0:
            raise _too_fast(client, tokens)
        self._buckets[client.tenant] = (tokens - 1.0, now_s)


class SharedLimits:
    """Limits over all workers, in one SQLite file that the server empties at start.

    Each check is one immediate transaction. What a worker held when it died is given back by
    the next request that meets the limit.
    """

    def __init__(self, path: Path, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._pid = os.getpid()
        self._db = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, isolation_level=None)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=OFF")  # the counts mean nothing after a crash of the machine
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS in_flight"
            " (tenant TEXT, pid INTEGER, count INTEGER, PRIMARY KEY (tenant, pid)) WITHOUT ROWID"
        )
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS buckets"
            " (tenant TEXT PRIMARY KEY, tokens REAL, updated_s REAL) WITHOUT ROWID"
        )

    def acquire(self, client: Client) -> None:
        if client.max_concurrency is None and client.requests_per_minute is None:
            return
        with self._transaction():
            if client.max_concurrency is not None:
                self._check_concurrency(client, client.max_concurrency)
            if client.requests_per_minute is not None:
                self._take_token(client, client.requests_per_minute)
            if client.max_concurrency is not None:
                self._count(client, 1)

    def release(self, client: Client) -> None:
        if client.max_concurrency is not None:
            with self._transaction():
                self._count(client, -1)

    def close(self) -> None:
        self._db.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            self._db.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            raise OverloadedError(f"the limits can't be checked: {error}", retry_after_s=1.0) from None
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def _check_concurrency(self, client: Client, limit: int) -> None:
        if self._in_flight(client) < limit:
            return
        self._forget_dead_workers(client)
        if self._in_flight(client) >= limit:
            raise _too_many_at_once(client)

    def _in_flight(self, client: Client) -> int:
        query = "SELECT sum(count) FROM in_flight WHERE tenant = ?"
        return int(self._db.execute(query, (client.tenant,)).fetchone()[0] or 0)

    def _forget_dead_workers(self, client: Client) -> None:
        rows = self._db.execute("SELECT pid FROM in_flight WHERE tenant = ?", (client.tenant,)).fetchall()
        for (pid,) in rows:
            if not _is_alive(int(pid)):
                self._db.execute("DELETE FROM in_flight WHERE pid = ?", (pid,))

    def _count(self, client: Client, change: int) -> None:
        self._db.execute(
            "INSERT INTO in_flight VALUES (?, ?, max(0, ?))"
            " ON CONFLICT (tenant, pid) DO UPDATE SET count = max(0, count + ?)",
            (client.tenant, self._pid, change, change),
        )

    def _take_token(self, client: Client, per_minute: int) -> None:
        now_s = self._clock()
        row = self._db.execute(
            "SELECT tokens, updated_s FROM buckets WHERE tenant = ?", (client.tenant,)
        ).fetchone()
        tokens = _refilled(row[0], row[1], now_s, per_minute) if row else float(per_minute)
        if tokens < 1.0:
            raise _too_fast(client, tokens)
        self._db.execute(
            "INSERT OR REPLACE INTO buckets VALUES (?, ?, ?)", (client.tenant, tokens - 1.0, now_s)
        )


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
