"""`/v1/stream`: several generations over one socket, a credit for each, cancel, errors, bad messages."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import defaultdict
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from edge.harness import KEY, CoreProcess, ask, chat, eventually
from longshore.tier_process import TierProcess
from longshore.wire import (
    ErrorMessage,
    FinishMessage,
    PongMessage,
    TokenMessage,
    decode_server_message,
)


@contextlib.asynccontextmanager
async def socket_to(edge: TierProcess, **options: Any) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
    options.setdefault("headers", {"Authorization": f"Bearer {KEY}"})
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(edge.url + "/v1/stream", **options) as ws,
    ):
        yield ws


async def receive(ws: aiohttp.ClientWebSocketResponse) -> Any:
    return decode_server_message(await ws.receive_json(timeout=5))


async def until_end(ws: aiohttp.ClientWebSocketResponse, *ids: str) -> dict[str, list[Any]]:
    """All messages up to the end of each of the generations."""
    got: dict[str, list[Any]] = defaultdict(list)
    running = set(ids)
    while running:
        message = await receive(ws)
        got[message.id].append(message)
        if isinstance(message, ErrorMessage) or (isinstance(message, FinishMessage) and message.done):
            running.discard(message.id)
    return got


def generate(name: str, **changes: Any) -> dict[str, Any]:
    credit = {"credit": changes.pop("credit")} if "credit" in changes else {}
    return {"type": "generate", "id": name, "request": chat(**changes), **credit}


@pytest.fixture(autouse=True)
async def well(core: CoreProcess) -> None:
    await core.set()
    await core.log(clear=True)


async def test_several_at_once(edge: TierProcess) -> None:
    async with socket_to(edge) as ws:
        for number in range(5):
            await ws.send_json(generate(f"g{number}", orders={"tokens": 10 + number, "gap_s": 0.005}))
        got = await until_end(ws, *(f"g{number}" for number in range(5)))
    for number in range(5):
        *tokens, finish = got[f"g{number}"]
        assert [token.mark.offset for token in tokens] == list(range(10 + number))
        assert finish.done and finish.usage.completion_tokens == 10 + number
        assert [hop.tier for hop in finish.report.hops] == ["edge", "core"]


async def test_choices(edge: TierProcess) -> None:
    async with socket_to(edge) as ws:
        await ws.send_json(generate("g", n=2))
        finishes = [item for item in (await until_end(ws, "g"))["g"] if isinstance(item, FinishMessage)]
    assert [(finish.index, finish.done) for finish in finishes] == [(0, False), (1, True)]


async def test_credit_holds_one_and_not_the_other(edge: TierProcess) -> None:
    async with socket_to(edge) as ws:
        await ws.send_json(generate("slow", orders={"tokens": 6}, credit=2))
        await ws.send_json(generate("free", orders={"tokens": 6}))
        got = await until_end(ws, "free")
        while len(got["slow"]) < 2:
            message = await receive(ws)
            got[message.id].append(message)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(ws.receive(), 0.3)
        # aiohttp closes a socket whose receive was cancelled only if a frame was half read; it was not.
        await ws.send_json({"type": "credit", "id": "slow", "tokens": 1})
        third = await receive(ws)
        assert isinstance(third, TokenMessage) and third.mark.offset == 2
        await ws.send_json({"type": "credit", "id": "slow", "tokens": 100})
        rest = (await until_end(ws, "slow"))["slow"]
    assert [token.mark.offset for token in rest[:-1]] == [3, 4, 5]


async def test_cancel_stops_the_core(edge: TierProcess, core: CoreProcess) -> None:
    async with socket_to(edge) as ws:
        await ws.send_json(generate("g", orders={"tokens": 10_000, "gap_s": 0.01}))
        assert isinstance(await receive(ws), TokenMessage)
        await ws.send_json({"type": "cancel", "id": "g"})
        end = (await until_end(ws, "g"))["g"][-1]
        assert isinstance(end, ErrorMessage) and end.error["code"] == "cancelled"
        await eventually(lambda: _all_ended(core, 1), within_s=1.0)
        await ws.send_json(generate("g"))
        assert isinstance((await until_end(ws, "g"))["g"][-1], FinishMessage)


async def test_closing_stops_all(edge: TierProcess, core: CoreProcess) -> None:
    async with socket_to(edge) as ws:
        for name in ("a", "b", "c"):
            await ws.send_json(generate(name, orders={"stall_after": 1}))
        for _ in range(3):
            await receive(ws)
    await eventually(lambda: _all_ended(core, 3), within_s=1.0)


async def _all_ended(core: CoreProcess, count: int) -> bool:
    return [record["ended"] for record in await core.log()][:count] == ["disconnected"] * count


async def test_interrupted(edge: TierProcess) -> None:
    async with socket_to(edge) as ws:
        await ws.send_json(generate("g", orders={"cut_after": 2}))
        *tokens, end = (await until_end(ws, "g"))["g"]
        assert len(tokens) == 2
        assert isinstance(end, ErrorMessage)
        assert (end.error["code"], end.error["tokens_delivered"]) == ("answer_interrupted", 2)


async def test_a_bare_chat_request_and_the_cache(edge: TierProcess, core: CoreProcess) -> None:
    request = chat(temperature=0, seed=991, stream=True)
    async with socket_to(edge) as ws:
        for _ in range(2):
            await ws.send_json(request)
            message = await receive(ws)
            *_, finish = (await until_end(ws, message.id))[message.id]
        assert finish.report.cached
        assert len(await core.log()) == 1


@pytest.mark.parametrize(
    ("frame", "code", "has_id"),
    [
        ("{", "malformed_body", False),
        ("[]", "bad_message", False),
        ('{"type": "dance"}', "bad_message", False),
        ('{"type": "generate", "id": "x", "request": {"model": "shop"}}', "invalid_request", True),
        (json.dumps(generate("x", temperature=99)), "out_of_range", True),
        (json.dumps(generate("x", model="nobody")), "model_not_found", True),
        (json.dumps(generate("x", longshore={"privacy": "device-only"})), "permission_denied", True),
        (
            json.dumps({"type": "resume", "id": "x", "request_id": "0" * 32, "offset": 1}),
            "resume_unavailable",
            True,
        ),
        (json.dumps({"type": "credit", "id": "x", "tokens": 0}), "out_of_range", True),
    ],
)
async def test_bad_messages_leave_the_socket_open(
    edge: TierProcess, frame: str, code: str, has_id: bool
) -> None:
    async with socket_to(edge) as ws:
        await ws.send_str(frame)
        message = await receive(ws)
        assert isinstance(message, ErrorMessage)
        assert (message.error["code"], message.id) == (code, "x" if has_id else None)
        await ws.send_json({"type": "ping", "nonce": "n"})
        assert await receive(ws) == PongMessage("n")


async def test_an_id_in_use_does_not_end_what_runs(edge: TierProcess) -> None:
    async with socket_to(edge) as ws:
        await ws.send_json(generate("g", orders={"tokens": 30, "gap_s": 0.01}))
        await receive(ws)
        await ws.send_json(generate("g"))
        messages = []
        while not (messages and isinstance(messages[-1], FinishMessage)):
            messages.append(await receive(ws))
        errors = [item for item in messages if isinstance(item, ErrorMessage)]
        assert [(error.id, error.error["code"]) for error in errors] == [(None, "bad_message")]


async def test_keys(edge: TierProcess) -> None:
    async with socket_to(edge, headers={}, protocols=["longshore.v1", f"bearer.{KEY}"]) as ws:
        assert ws.protocol == "longshore.v1"
        await ws.send_json({"type": "ping"})
        assert isinstance(await receive(ws), PongMessage)
    for options in ({"headers": {}}, {"headers": {"Authorization": "Bearer no"}}):
        with pytest.raises(aiohttp.WSServerHandshakeError):
            async with socket_to(edge, **options):
                pass


async def test_http_goes_on_beside_it(edge: TierProcess, session: aiohttp.ClientSession) -> None:
    async with socket_to(edge) as ws:
        await ws.send_json(generate("g", orders={"stall_after": 1}))
        await receive(ws)
        assert (await ask(session, chat()))[0] == 200
