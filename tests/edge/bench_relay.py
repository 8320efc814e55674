"""CPU microseconds of the edge's worker per request, beside a bare ASGI application on the same server.

Run: `python tests/edge/bench_relay.py`, from the repository. Loopback, one worker, some seconds in all.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from edge.harness import ask, chat, edge_toml, session_to, start_core, start_edge

NUM_TOKENS = 63  # and the chunk with the end
NUM_AT_ONCE = 16
ROUNDS = 5
ANSWER = b"x" * 700


async def bare(scope: Any, receive: Any, send: Any) -> None:
    """Reads the body and answers fixed bytes: what the server itself costs."""
    if scope["type"] == "http":
        await receive()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(ANSWER))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": ANSWER})


@contextlib.contextmanager
def start_bare() -> Iterator[tuple[str, int]]:
    """(address, process id) of granian with the bare application."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "granian", "--interface", "asginl", "--no-log", "--port", str(port)]
    process = subprocess.Popen([*command, "bench_relay:bare"], cwd=Path(__file__).parent)
    try:
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        process.terminate()
        process.wait(10)


def worker_of(pid: int) -> psutil.Process:
    children = psutil.Process(pid).children()
    return next(child for child in children if "resource_tracker" not in " ".join(child.cmdline()))


async def cpu_us(
    session: aiohttp.ClientSession, worker: psutil.Process, body: Any, count: int
) -> list[float]:
    """CPU per request, one figure a round, after a round to warm up."""

    async def one_after_another() -> None:
        for _ in range(count // NUM_AT_ONCE):
            async with session.post("/v1/chat/completions", json=body) as response:
                await response.read()
                assert response.status == 200

    figures = []
    for _ in range(ROUNDS + 1):
        before = worker.cpu_times()
        await asyncio.gather(*(one_after_another() for _ in range(NUM_AT_ONCE)))
        after = worker.cpu_times()
        num_requests = count // NUM_AT_ONCE * NUM_AT_ONCE
        figures.append((after.user + after.system - before.user - before.system) / num_requests * 1e6)
    return figures[1:]


async def measure(session: aiohttp.ClientSession, worker: psutil.Process, cases: Any) -> None:
    for name, body, count in cases:
        figures = await cpu_us(session, worker, body, count)
        spread = f"{min(figures):.0f} to {max(figures):.0f}, {ROUNDS} rounds of {count}"
        print(f"{name:34} {statistics.median(figures):7.0f} us  ({spread})")


async def main() -> None:
    with start_bare() as (url, pid):
        async with session_to(url) as session:
            for _ in range(100):
                with contextlib.suppress(aiohttp.ClientError):
                    async with session.post("/", data=b"x") as response:
                        await response.read()
                    break
                await asyncio.sleep(0.1)
            await measure(session, worker_of(pid), [("bare application, fixed bytes", chat(), 2000)])
    stream = chat(stream=True, orders={"tokens": NUM_TOKENS})
    paced = chat(stream=True, orders={"tokens": NUM_TOKENS, "gap_s": 0.001})
    cases = [
        ("cached answer", chat(temperature=0), 2000),
        ("cached stream of 64 chunks", stream | {"temperature": 0}, 1000),
        ("JSON passed through", chat(), 640),
        ("stream of 64 chunks", stream, 160),
        ("stream of 64 chunks, paced", paced, 64),
    ]
    with tempfile.TemporaryDirectory() as folder, start_core("core-a") as core:
        begun_s = time.monotonic()
        with start_edge(Path(folder), edge_toml([core])) as edge:
            print(f"{'start to ready':34} {time.monotonic() - begun_s:7.2f} s")
            async with session_to(edge) as session:
                assert (await ask(session, chat()))[0] == 200
                await measure(session, worker_of(edge.pid), cases)
                rss_bytes = worker_of(edge.pid).memory_info().rss
                print(f"{'resident memory of the worker':34} {rss_bytes / 2**20:7.0f} MB")


if __name__ == "__main__":
    asyncio.run(main())
