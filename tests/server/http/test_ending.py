"""The core's own end: what clients see of a stream, a whole answer and a socket when it is told to stop."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest
import websockets
from websockets.asyncio.client import ClientConnection, connect

from longshore.signing import PrivateKey
from longshore.sse import ServerEvent, SseDecoder
from longshore.tier_process import TierProcess

from .conftest import Core, chat, long_chat, settings

CHAT = "/v1/chat/completions"
pytestmark = pytest.mark.slow  # each starts a core of its own


async def _read(http: httpx2.AsyncClient, begun: asyncio.Event) -> list[ServerEvent]:
    decoder, events = SseDecoder(), []
    async with http.stream("POST", CHAT, json=long_chat(stream=True, n=4)) as response:
        async for data in response.aiter_bytes():
            begun.set()
            events += decoder.feed(data)
    return events


async def _last_message(socket: ClientConnection) -> dict[str, Any]:
    last = ""
    with pytest.raises(websockets.ConnectionClosed):
        while True:
            last = str(await socket.recv())
    message: dict[str, Any] = json.loads(last)
    return message


async def test_sigterm_ends_what_can_not_finish_with_a_typed_error(core: Core, tmp_path: Path) -> None:
    """The answers are longer than the time to finish them."""
    config = tmp_path / "core.toml"
    config.write_text("drain_timeout_s = 2.0\n" + settings(Core("", core.model_dir, PrivateKey.generate())))
    with TierProcess(["serve", "--config", str(config)], environment={"OMP_NUM_THREADS": "1"}) as process:
        url = process.url.replace("http", "ws") + "/v1/stream"
        async with (
            httpx2.AsyncClient(base_url=process.url, headers=core.headers, timeout=30) as http,
            connect(url, additional_headers=core.headers, proxy=None, max_queue=None) as socket,
        ):
            begun = asyncio.Event()
            streaming = asyncio.create_task(_read(http, begun))
            await asyncio.wait_for(begun.wait(), 20)
            await socket.send(json.dumps(long_chat(n=4)))
            await asyncio.wait_for(socket.recv(), 10)
            begin_s = time.monotonic()
            os.kill(process.pid, signal.SIGTERM)
            while (await http.get("/readyz")).status_code == 200:
                assert time.monotonic() - begin_s < 5
            late = await http.post(CHAT, json=chat())
            events = await asyncio.wait_for(streaming, 15)
            message = await asyncio.wait_for(_last_message(socket), 15)
            assert time.monotonic() - begin_s < 10
    assert (late.status_code, late.json()["error"]["code"]) == (503, "unavailable")
    assert late.headers["retry-after"]
    assert events[-1].event == "error"
    assert json.loads(events[-1].data)["error"]["code"] == "unavailable"
    assert not any(event.is_done for event in events)
    assert message["type"] == "error"
    assert message["error"]["code"] == "unavailable"


async def test_sigterm_lets_answers_finish(core: Core, tmp_path: Path) -> None:
    config = tmp_path / "core.toml"
    config.write_text("drain_timeout_s = 60.0\n" + settings(Core("", core.model_dir, PrivateKey.generate())))
    with TierProcess(["serve", "--config", str(config)], environment={"OMP_NUM_THREADS": "1"}) as process:
        async with httpx2.AsyncClient(base_url=process.url, headers=core.headers, timeout=60) as http:
            begun = asyncio.Event()
            streaming = asyncio.create_task(_read(http, begun))
            await asyncio.wait_for(begun.wait(), 20)
            os.kill(process.pid, signal.SIGTERM)
            events = await asyncio.wait_for(streaming, 60)
    assert events[-1].is_done
    assert len(events) == 4 * 901 + 1  # of each choice the tokens and the end, then [DONE]
