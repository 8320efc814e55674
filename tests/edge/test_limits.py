"""Per-tenant limits: alone, shared over processes, after a worker's death, through an edge of two workers."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from edge.harness import KEY_SHA256, CoreProcess, ask, chat, edge_toml, session_to, start_edge
from longshore.errors import RateLimitedError
from longshore_edge.auth import Client
from longshore_edge.limits import Limits, make_limits

BUSY = Client("busy", max_concurrency=2)
QUICK = Client("quick", requests_per_minute=3)


class Clock:
    now_s = 50.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture(params=["memory", "shared"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return None if request.param == "memory" else tmp_path / "limits.sqlite"


def test_concurrency(path: Path | None) -> None:
    limits = make_limits(path, Clock())
    limits.acquire(BUSY)
    limits.acquire(BUSY)
    for _ in range(3):
        with pytest.raises(RateLimitedError, match="2 requests at once"):
            limits.acquire(BUSY)
    limits.acquire(Client("other", max_concurrency=2))
    limits.release(BUSY)
    limits.acquire(BUSY)
    limits.close()


def test_rate(path: Path | None) -> None:
    clock = Clock()
    limits = make_limits(path, clock)
    for _ in range(3):
        limits.acquire(QUICK)
    with pytest.raises(RateLimitedError) as caught:
        limits.acquire(QUICK)
    assert caught.value.retry_after_s == 20.0
    clock.now_s += 19
    with pytest.raises(RateLimitedError):
        limits.acquire(QUICK)
    clock.now_s += 1.01
    limits.acquire(QUICK)
    clock.now_s -= 1000  # another boot's clock
    with pytest.raises(RateLimitedError):
        limits.acquire(QUICK)
    limits.close()


def test_a_refused_request_takes_nothing(path: Path | None) -> None:
    both = Client("both", max_concurrency=1, requests_per_minute=2)
    limits: Limits = make_limits(path, Clock())
    limits.acquire(both)
    with pytest.raises(RateLimitedError, match="at once"):
        limits.acquire(both)
    limits.release(both)
    limits.acquire(both)  # the second token is still there
    limits.close()


def test_what_a_dead_worker_held_is_given_back(tmp_path: Path) -> None:
    path = tmp_path / "limits.sqlite"
    held = make_limits(path, Clock())
    code = (
        "import os, sys, time; from pathlib import Path\n"
        "from longshore_edge.limits import make_limits; from longshore_edge.auth import Client\n"
        "limits = make_limits(Path(sys.argv[1]), time.monotonic)\n"
        "for _ in range(2): limits.acquire(Client('busy', max_concurrency=2))\n"
        "print('held', flush=True); sys.stdin.read(); os._exit(9)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RateLimitedError):
            held.acquire(BUSY)
        other.communicate("", timeout=10)
    held.acquire(BUSY)
    held.close()


async def test_two_workers_keep_one_limit(core: CoreProcess, tmp_path: Path) -> None:
    await core.set()
    toml = edge_toml([core], "workers = 2").replace(
        f'key_sha256 = "{KEY_SHA256}"', f'key_sha256 = "{KEY_SHA256}"\nmax_concurrency = 3'
    )
    with start_edge(tmp_path, toml) as edge:

        async def one() -> tuple[int, str | None]:
            async with session_to(edge) as session:  # a connection each, spread over the workers
                status, _, headers = await ask(session, chat(orders={"wait_s": 0.7}))
                return status, headers.get("retry-after") if status == 429 else None

        replies = await asyncio.gather(*(one() for _ in range(12)))
        assert sorted(status for status, _ in replies) == [200] * 3 + [429] * 9
        assert {retry for status, retry in replies if status == 429} == {"1"}
        assert (await one())[0] == 200
        async with session_to(edge) as session, session.get("/metrics") as response:
            text = await response.text()
        assert "longshore:edge_requests_total" in text
