"""WebSocket /v1/stream against a real core."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import pytest
import websockets
from websockets.asyncio.client import ClientConnection, connect

from longshore.sse import encode_message, read_server_message
from longshore.wire import (
    CancelMessage,
    CreditMessage,
    ErrorMessage,
    FinishMessage,
    GenerateMessage,
    PingMessage,
    PongMessage,
    ResumeMessage,
    ServerMessage,
    TokenMessage,
    decode_chat_request,
    new_request_id,
)

from .conftest import Core, chat, eventually_idle, long_chat

MAX_WAIT_S = 10.0


@asynccontextmanager
async def _open(core: Core, **options: Any) -> AsyncIterator[ClientConnection]:
    options.setdefault("additional_headers", core.headers)
    options.setdefault("max_queue", None)  # else a client that stops reading does not see the close either
    url = core.url.replace("http://", "ws://") + "/v1/stream"
    async with connect(url, proxy=None, **options) as socket:
        yield socket


async def _next(socket: ClientConnection) -> ServerMessage:
    return read_server_message(await asyncio.wait_for(socket.recv(), MAX_WAIT_S))


async def _send(socket: ClientConnection, message: Any) -> None:
    await socket.send(encode_message(message))


def _generate(name: str, credit: int | None = None, **fields: Any) -> GenerateMessage:
    return GenerateMessage(name, decode_chat_request(chat(**fields)), credit)


async def _until_done(socket: ClientConnection, names: set[str]) -> dict[str, list[ServerMessage]]:
    """Every message of the generations `names`, until each has its end."""
    messages: dict[str, list[ServerMessage]] = {name: [] for name in names}
    num_open = len(names)
    while num_open:
        message = await _next(socket)
        assert isinstance(message, TokenMessage | FinishMessage | ErrorMessage)
        messages[str(message.id)].append(message)
        num_open -= isinstance(message, ErrorMessage) or (isinstance(message, FinishMessage) and message.done)
    return messages


def _text(messages: list[ServerMessage]) -> str:
    return "".join(item.text for item in messages if isinstance(item, TokenMessage | FinishMessage))


async def test_several_generations_at_once(core: Core, http: httpx2.AsyncClient) -> None:
    expected = (await http.post("/v1/chat/completions", json=chat(max_tokens=20))).json()
    async with _open(core) as socket:
        for name in "abc":
            await _send(socket, _generate(name, max_tokens=20))
        await _send(socket, _generate("n", max_tokens=5, n=2, temperature=1, seed=1))
        got = await _until_done(socket, {"a", "b", "c", "n"})
    for name in "abc":
        assert _text(got[name]) == expected["choices"][0]["message"]["content"]
        end = got[name][-1]
        assert isinstance(end, FinishMessage)
        assert end.usage is not None
        assert end.usage.completion_tokens == 20
        assert end.report is not None
        assert end.report.served_by == "core"
    ends = [item for item in got["n"] if isinstance(item, FinishMessage)]
    assert [end.done for end in ends] == [False, True]
    assert {end.index for end in ends} == {0, 1}


async def test_a_bare_chat_request_is_generate(core: Core) -> None:
    async with _open(core) as socket:
        await socket.send(json.dumps(chat(stream=True)))
        first = await _next(socket)
        assert isinstance(first, TokenMessage)
        await _until_done(socket, {first.id})


async def test_credit_holds_one_generation_and_not_the_others(core: Core) -> None:
    async with _open(core) as socket:
        await _send(socket, _generate("slow", credit=3, max_tokens=10))
        await _send(socket, _generate("fast", max_tokens=30))
        got: dict[str, list[ServerMessage]] = {"slow": [], "fast": []}
        while not (got["fast"] and isinstance(got["fast"][-1], FinishMessage)):
            message = await _next(socket)
            assert isinstance(message, TokenMessage | FinishMessage)
            got[message.id].append(message)
        assert len(got["fast"]) == 31
        while len(got["slow"]) < 3:
            got["slow"].append(await _next(socket))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(socket.recv(), 0.3)
        await _send(socket, CreditMessage("slow", 2))
        got["slow"] += [await _next(socket), await _next(socket)]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(socket.recv(), 0.3)
        await _send(socket, CreditMessage("slow", 100))
        got["slow"] += (await _until_done(socket, {"slow"}))["slow"]
    tokens = [item for item in got["slow"] if isinstance(item, TokenMessage)]
    assert [item.mark.offset for item in tokens] == list(range(10))


async def test_no_credit_for_long_ends_that_generation(core: Core) -> None:
    async with _open(core) as socket:
        await _send(socket, _generate("slow", credit=1, max_tokens=10))
        messages = (await _until_done(socket, {"slow"}))["slow"]
        assert isinstance(messages[-1], ErrorMessage)
        assert messages[-1].error["code"] == "answer_interrupted"
        await _send(socket, _generate("next"))
        await _until_done(socket, {"next"})


async def test_cancel_ends_it_in_the_engine(core: Core, http: httpx2.AsyncClient) -> None:
    async with _open(core) as socket:
        await _send(socket, GenerateMessage("a", decode_chat_request(long_chat())))
        await _send(socket, _generate("b", max_tokens=60))
        assert isinstance(await _next(socket), TokenMessage)
        await _send(socket, CancelMessage("a"))
        got = await _until_done(socket, {"a", "b"})
        assert isinstance(got["a"][-1], ErrorMessage)
        assert got["a"][-1].error["code"] == "cancelled"
        assert isinstance(got["b"][-1], FinishMessage)
        assert await eventually_idle(http, 1.0) < 1.0
        await _send(socket, CancelMessage("a"))  # it has ended: nothing happens
        await _send(socket, _generate("a"))
        await _until_done(socket, {"a"})


async def test_leaving_ends_every_generation(core: Core, http: httpx2.AsyncClient) -> None:
    async with _open(core) as socket:
        for name in "abcd":
            await _send(socket, GenerateMessage(name, decode_chat_request(long_chat())))
        for _ in range(8):
            await _next(socket)
        socket.transport.abort()
    assert await eventually_idle(http, 1.0) < 1.0


async def test_ping(core: Core) -> None:
    async with _open(core) as socket:
        await _send(socket, PingMessage("n1"))
        assert await _next(socket) == PongMessage("n1")


@pytest.mark.parametrize(
    ("frame", "code", "name"),
    [
        ("", "malformed_body", None),
        ("{", "malformed_body", None),
        ("[]", "bad_message", None),
        ('{"type":"dance"}', "bad_message", None),
        ('{"type":"generate","id":"x"}', "invalid_request", "x"),
        ('{"type":"generate","id":"","request":{}}', "out_of_range", None),
        ('{"type":"credit","id":"x","tokens":0}', "out_of_range", "x"),
        ('{"type":"generate","id":"x","request":{"model":"tiny","messages":NaN}}', "malformed_body", None),
        (b"\xff\xfe", "malformed_body", None),
        ("x" * 9_000_000, "body_too_large", None),
    ],
)
async def test_a_bad_message_is_told_and_the_socket_lives(
    core: Core, frame: str | bytes, code: str, name: str | None
) -> None:
    async with _open(core, max_size=None) as socket:
        await socket.send(frame)
        error = await _next(socket)
        assert isinstance(error, ErrorMessage)
        assert (error.error["code"], error.id) == (code, name)
        await _send(socket, _generate("after"))
        await _until_done(socket, {"after"})


async def test_requests_that_are_refused(core: Core) -> None:
    async with _open(core) as socket:
        for fields, code in (
            ({"model": "nobody"}, "model_not_found"),
            ({"longshore": {"lane": "vip"}}, "permission_denied"),
            ({"content": None, "text": "lamp " * 3000}, "context_length_exceeded"),
        ):
            await _send(socket, _generate("x", **fields))
            error = await _next(socket)
            assert isinstance(error, ErrorMessage)
            assert (error.id, error.error["code"]) == ("x", code)
        await _send(socket, ResumeMessage("r", new_request_id(), 0))
        error = await _next(socket)
        assert isinstance(error, ErrorMessage)
        assert (error.id, error.error["code"]) == ("r", "resume_unavailable")


async def test_an_id_is_used_once_at_a_time(core: Core) -> None:
    async with _open(core) as socket:
        await _send(socket, GenerateMessage("a", decode_chat_request(long_chat())))
        await _next(socket)
        await _send(socket, _generate("a"))
        message = await _next(socket)
        while isinstance(message, TokenMessage):
            message = await _next(socket)
        assert isinstance(message, ErrorMessage)
        assert message.error["code"] == "duplicate_request"


async def test_a_browser_sends_its_key_as_subprotocol(core: Core) -> None:
    protocols = ["longshore.v1", f"bearer.{core.key}"]
    async with _open(core, additional_headers=None, subprotocols=protocols) as socket:
        assert socket.subprotocol == "longshore.v1"
        await _send(socket, _generate("a"))
        await _until_done(socket, {"a"})


@pytest.mark.parametrize("headers", [None, {"authorization": "Bearer wrong"}])
async def test_no_key_no_socket(core: Core, headers: dict[str, str] | None) -> None:
    with pytest.raises(websockets.InvalidStatus) as caught:
        async with _open(core, additional_headers=headers):
            pass
    assert caught.value.response.status_code == 401
    assert json.loads(caught.value.response.body)["error"]["code"] == "invalid_api_key"
