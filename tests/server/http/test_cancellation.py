"""A client that leaves takes its answer along: the engine stops working on it at once."""

from __future__ import annotations

import asyncio
import json
import socket
import time

import httpx2
import pytest

from .conftest import Core, chat, eventually_idle, long_chat, metric

CHAT = "/v1/chat/completions"
MAX_IDLE_S = 1.0


def _client(core: Core, http2: bool) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(base_url=core.url, headers=core.headers, http1=not http2, http2=http2)


async def _until_running(http: httpx2.AsyncClient, num: int) -> None:
    end_s = time.monotonic() + 5
    while (running := await metric(http, "vllm:num_requests_running")) < num:
        assert time.monotonic() < end_s, f"{running} of {num} requests began"
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("http2", [False, True])
@pytest.mark.parametrize("n", [1, 4])
async def test_leaving_in_mid_stream(core: Core, http: httpx2.AsyncClient, http2: bool, n: int) -> None:
    await eventually_idle(http)
    cancelled = await metric(http, "longshore:requests_cancelled_total")
    async with (
        _client(core, http2) as client,
        client.stream("POST", CHAT, json=long_chat(stream=True, n=n)) as response,
    ):
        chunks = response.aiter_bytes()  # held: an iterator that is collected closes the connection
        await anext(chunks)
        await _until_running(http, n)
    assert await eventually_idle(http, MAX_IDLE_S) < MAX_IDLE_S
    generated = await metric(http, "vllm:generation_tokens_total")
    await asyncio.sleep(0.1)
    assert await metric(http, "vllm:generation_tokens_total") == generated
    assert await metric(http, "longshore:requests_cancelled_total") == cancelled + 1


@pytest.mark.parametrize("http2", [False, True])
@pytest.mark.parametrize("n", [1, 4])
async def test_leaving_before_a_whole_answer(
    core: Core, http: httpx2.AsyncClient, http2: bool, n: int
) -> None:
    await eventually_idle(http)
    cancelled = await metric(http, "longshore:requests_cancelled_total")
    async with _client(core, http2) as client:
        asking = asyncio.create_task(client.post(CHAT, json=long_chat(n=n)))
        await _until_running(http, n)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
    assert await eventually_idle(http, MAX_IDLE_S) < MAX_IDLE_S
    assert await metric(http, "longshore:requests_cancelled_total") == cancelled + 1


async def test_a_stop_string_ends_the_work(http: httpx2.AsyncClient) -> None:
    await eventually_idle(http)
    text = (await http.post(CHAT, json=chat(max_tokens=10))).json()["choices"][0]["message"]["content"]
    generated = await metric(http, "vllm:generation_tokens_total")
    answer = (await http.post(CHAT, json=long_chat(stop=[text[:6]]))).json()
    assert answer["choices"][0]["message"]["content"] == ""
    await eventually_idle(http, MAX_IDLE_S)
    assert await metric(http, "vllm:generation_tokens_total") - generated < 50


async def test_a_client_that_reads_nothing_is_given_up(core: Core, http: httpx2.AsyncClient) -> None:
    """It holds up nobody meanwhile, and its place is free again after `reader_timeout_s`."""
    await eventually_idle(http)
    given_up = await metric(http, "longshore:errors_total", code="answer_interrupted")
    host, port = core.url.removeprefix("http://").split(":")
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect((host, int(port)))
        body = json.dumps(long_chat(stream=True, n=6, logprobs=True, top_logprobs=20)).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {core.key}\r\n"
        sock.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        await _until_running(http, 6)
        begin_s = time.monotonic()
        response = await http.post(CHAT, json=chat(max_tokens=2))
        assert response.status_code == 200
        assert time.monotonic() - begin_s < 2
        await eventually_idle(http, 12)
        end_s = time.monotonic() + 8
        while await metric(http, "longshore:errors_total", code="answer_interrupted") == given_up:
            assert time.monotonic() < end_s, "a reader that takes nothing is kept for ever"
            await asyncio.sleep(0.1)
    assert (await http.post(CHAT, json=chat())).status_code == 200
