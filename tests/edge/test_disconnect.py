"""A client that leaves stops the core's work at once, streaming or not, first byte or not."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import h2.config
import h2.connection
import pytest

from edge.harness import CoreProcess, ask, chat, eventually
from longshore.tier_process import TierProcess


async def ended_as(core: CoreProcess, ending: str) -> bool:
    log = await core.log()
    return bool(log) and log[-1]["ended"] == ending


@pytest.mark.parametrize(
    "body",
    [
        chat(stream=True, orders={"tokens": 1000, "gap_s": 0.02}),
        chat(stream=True, orders={"wait_s": 60}),
        chat(stream=True, orders={"stall_after": 3}),
        chat(orders={"wait_s": 60}),
        chat(temperature=0, orders={"wait_s": 60}),
    ],
    ids=["mid-stream", "stream-before-first", "stalled", "whole", "whole-cacheable"],
)
async def test_leaving_stops_the_core(session: aiohttp.ClientSession, core: CoreProcess, body: Any) -> None:
    await core.log(clear=True)
    request = asyncio.create_task(leave_after_first_bytes(session, body))
    await eventually(core.log)
    await asyncio.sleep(0.1)
    request.cancel()
    await asyncio.gather(request, return_exceptions=True)
    await eventually(lambda: ended_as(core, "disconnected"), within_s=1.0)
    assert (await ask(session, chat()))[0] == 200


async def leave_after_first_bytes(session: aiohttp.ClientSession, body: Any) -> None:
    async with session.post("/v1/chat/completions", json=body) as response:
        await response.content.read()


async def test_leaving_is_counted_and_nothing_stays_in_flight(
    session: aiohttp.ClientSession, core: CoreProcess
) -> None:
    await core.log(clear=True)
    request = asyncio.create_task(leave_after_first_bytes(session, chat(orders={"wait_s": 60})))
    await eventually(core.log)
    request.cancel()
    await asyncio.gather(request, return_exceptions=True)

    async def is_idle() -> bool:
        async with session.get("/metrics") as response:
            text = await response.text()
        return "longshore:edge_requests_in_flight 0" in text and 'outcome="left"' in text

    await eventually(is_idle)


async def test_leaving_over_http2(edge: TierProcess, core: CoreProcess) -> None:
    """A reset stream of a connection that stays open is a client that left, too."""
    await core.set()
    await core.log(clear=True)
    host, port = edge.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    connection.initiate_connection()
    body = json.dumps(chat(stream=True, orders={"wait_s": 60})).encode()
    connection.send_headers(
        1,
        [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", "/v1/chat/completions"),
            (":authority", f"{host}:{port}"),
            ("authorization", "Bearer test-key"),
            ("content-length", str(len(body))),
        ],
    )
    connection.send_data(1, body, end_stream=True)
    writer.write(connection.data_to_send())
    await eventually(core.log)
    connection.reset_stream(1)
    writer.write(connection.data_to_send())
    await eventually(lambda: ended_as(core, "disconnected"), within_s=1.0)
    writer.close()
    await writer.wait_closed()
