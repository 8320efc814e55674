"""Starts edges and fixture cores as real processes for the edge's tests, and asks them over sockets."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from longshore.signing import PrivateKey
from longshore.sse import ServerEvent, SseDecoder
from longshore.tier_process import TierProcess

KEY = "test-key"
KEY_SHA256 = hashlib.sha256(KEY.encode()).hexdigest()
OTHER_KEY = "other-key"
AUTH = {"Authorization": f"Bearer {KEY}"}
SIGNING_KEY = PrivateKey("AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8")
CORE = Path(__file__).with_name("fixture_core.py")
TIMEOUT = aiohttp.ClientTimeout(total=20)


@dataclass
class CoreProcess:
    name: str
    port: int
    process: subprocess.Popen[str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def set(self, **settings: Any) -> None:
        async with aiohttp.ClientSession(timeout=TIMEOUT) as session:
            await session.post(self.url + "/_set", json=settings)

    async def log(self, *, clear: bool = False) -> list[dict[str, Any]]:
        async with (
            aiohttp.ClientSession(timeout=TIMEOUT) as session,
            session.get(self.url + "/_log" + ("?clear=1" if clear else "")) as response,
        ):
            return (await response.json())["log"]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(5)
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextlib.contextmanager
def start_core(name: str, *, port: int = 0, **settings: Any) -> Iterator[CoreProcess]:
    command = [sys.executable, str(CORE), "--name", name, "--port", str(port), "--set", json.dumps(settings)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    words = process.stdout.readline().split()
    core = CoreProcess(name, int(words[1]), process)
    try:
        yield core
    finally:
        core.kill()


def edge_toml(cores: list[CoreProcess], extra: str = "", tables: str = "", core_extra: str = "") -> str:
    lines = [
        'node = "edge-1"',
        "port = 0",
        f'signing_key = "{SIGNING_KEY.text}"',
        "health_interval_s = 0.2",
        "open_metrics = true",
        extra,
    ]
    for core in cores:
        lines.append(f'[[cores]]\nname = "{core.name}"\nurl = "{core.url}"\n{core_extra}')
    lines.append(f'[[keys]]\ntenant = "acme"\nkey_sha256 = "{KEY_SHA256}"\n')
    return "\n".join(lines) + tables


@contextlib.contextmanager
def start_edge(folder: Path, toml: str) -> Iterator[TierProcess]:
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / "edge.toml"
    path.write_text(toml)
    with TierProcess(["edge", "--config", str(path)], start_timeout_s=30, stop_timeout_s=12) as edge:
        yield edge


def chat(**changes: Any) -> dict[str, Any]:
    """A chat request whose last message carries orders for the fixture core."""
    orders = changes.pop("orders", {})
    return {"model": "shop", "messages": [{"role": "user", "content": json.dumps(orders)}], **changes}


@contextlib.asynccontextmanager
async def session_to(edge: TierProcess | str, **headers: str) -> AsyncIterator[aiohttp.ClientSession]:
    url = edge if isinstance(edge, str) else edge.url
    async with aiohttp.ClientSession(url, headers=AUTH | headers, timeout=TIMEOUT) as session:
        yield session


async def ask(
    session: aiohttp.ClientSession, body: Any, path: str = "/v1/chat/completions", **headers: str
) -> tuple[int, Any, dict[str, str]]:
    """Status, parsed body and headers of one request that is not streamed."""
    async with session.post(path, json=body, headers=headers) as response:
        return response.status, await response.json(content_type=None), _lowered(response)


async def stream(
    session: aiohttp.ClientSession, body: Any, path: str = "/v1/chat/completions"
) -> list[ServerEvent]:
    """All events of a stream, up to its end in good order."""
    events: list[ServerEvent] = []
    decoder = SseDecoder()
    async with session.post(path, json=body | {"stream": True}) as response:
        assert response.status == 200, await response.text()
        assert response.headers["content-type"].startswith("text/event-stream")
        async for data in response.content.iter_any():
            events += decoder.feed(data)
    assert not decoder.has_partial_event
    return events


def text_of(events: list[ServerEvent]) -> str:
    chunks = [json.loads(event.data) for event in events if event.event == "message" and not event.is_done]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    return "".join(choice["delta"].get("content", "") for choice in choices)


def report_of(events: list[ServerEvent]) -> dict[str, Any]:
    for event in reversed(events):
        if not event.is_done and "report" in event.data:
            return json.loads(event.data)["longshore"]["report"]
    raise AssertionError("no report")


async def eventually(check: Callable[[], Any], *, within_s: float = 5.0) -> Any:
    """The first truthy value that `check` (a coroutine function) gives, before the deadline."""
    deadline_s = time.monotonic() + within_s
    while True:
        value = await check()
        if value:
            return value
        assert time.monotonic() < deadline_s, "it did not happen in time"
        await asyncio.sleep(0.02)


def _lowered(response: aiohttp.ClientResponse) -> dict[str, str]:
    return {name.lower(): value for name, value in response.headers.items()}
