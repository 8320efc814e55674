"""Whatever a client sends is answered by a typed error in OpenAI's shape, and the next request works."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest

from .conftest import MODEL, Core, chat

CHAT = "/v1/chat/completions"
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


async def _refused(response: httpx2.Response, status: int, code: str, param: str | None = None) -> str:
    body = response.json()
    assert response.status_code == status, body
    assert set(body) == {"error"}
    assert (body["error"]["code"], body["error"]["param"]) == (code, param)
    assert body["error"]["type"]
    return str(body["error"]["message"])


async def _still_works(http: httpx2.AsyncClient) -> None:
    response = await http.post(CHAT, json=chat())
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b'{"model":"tiny","temperature":NaN}',
        b'{"model":"tiny","temperature":Infinity}',
        b'{"model":"tiny\xff"}',
        b"[" * 5000 + b"]" * 5000,
        b'{"a":' * 50 + b"1" + b"}" * 50,
        b'{"model":' + b"9" * 5000 + b"}",
        b'{"model":"tiny","temperature":1e999}',
    ],
)
async def test_malformed_bodies(http: httpx2.AsyncClient, body: bytes) -> None:
    await _refused(await http.post(CHAT, content=body), 400, "malformed_body")
    await _still_works(http)


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({"model": MODEL}, 400, "invalid_request", "messages"),
        (chat(max_tokens=0), 400, "out_of_range", "max_tokens"),
        (chat(max_tokens="many"), 400, "invalid_request", "max_tokens"),
        (chat(n=17), 400, "out_of_range", "n"),
        (chat(min_tokens=5), 400, "out_of_range", "min_tokens"),
        (chat(messages=[]), 400, "out_of_range", "messages"),
        (chat(messages=[{"role": "tool", "content": "x"}]), 400, "out_of_range", "messages[0].role"),
        (chat(messages=[{"role": "user", "content": [IMAGE]}]), 400, "unsupported_parameter",
         "messages[0].content[0].image_url"),
        (chat(response_format={"type": "json_object"}), 400, "out_of_range", "response_format.type"),
        (chat(logit_bias={"999999": 1}), 400, "out_of_range", "logit_bias"),
        (chat(longshore={"privacy": "device-only"}), 403, "permission_denied", "longshore.privacy"),
        (chat(longshore={"lane": "vip"}), 403, "permission_denied", "longshore.lane"),
        (chat(longshore={"request_id": "short"}), 400, "out_of_range", "longshore.request_id"),
        (chat(model="nobody"), 404, "model_not_found", "model"),
        (chat(stream_options={"include_usage": True}), 400, "invalid_request", "stream_options"),
    ],
)  # fmt: skip
async def test_bad_fields(
    http: httpx2.AsyncClient, body: dict[str, Any], status: int, code: str, param: str
) -> None:
    await _refused(await http.post(CHAT, json=body), status, code, param)
    await _still_works(http)


async def test_bad_completions(http: httpx2.AsyncClient) -> None:
    path, body = "/v1/completions", {"model": MODEL, "max_tokens": 2}
    await _refused(await http.post(path, json=body | {"prompt": [5, 99999]}), 400, "out_of_range", "prompt")
    await _refused(await http.post(path, json=body | {"prompt": ""}), 400, "invalid_request", "prompt")
    await _refused(await http.post(path, json=body | {"prompt": "x", "suffix": "y"}), 400,
                   "unsupported_parameter", "suffix")  # fmt: skip
    await _still_works(http)


async def test_too_long_a_prompt_names_both_numbers(http: httpx2.AsyncClient) -> None:
    response = await http.post(CHAT, json=chat("lamp " * 3000))
    message = await _refused(response, 400, "context_length_exceeded", "messages")
    assert "1024" in message
    assert any(int(word) > 3000 for word in message.split() if word.isdigit())
    await _still_works(http)


@pytest.mark.parametrize("http2", [False, True])
async def test_body_over_the_limit(core: Core, http: httpx2.AsyncClient, http2: bool) -> None:
    body = json.dumps(chat("x" * 250_000)).encode()
    async with httpx2.AsyncClient(
        base_url=core.url, headers=core.headers, http1=not http2, http2=http2
    ) as client:
        await _refused(await client.post(CHAT, content=body), 413, "body_too_large")

        async def pieces() -> AsyncIterator[bytes]:  # no content-length
            for begin in range(0, len(body), 20_000):
                yield body[begin : begin + 20_000]

        await _refused(await client.post(CHAT, content=pieces()), 413, "body_too_large")
    await _still_works(http)


async def test_an_endless_body_is_cut_off(core: Core, http: httpx2.AsyncClient) -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 65_536

    with pytest.raises(httpx2.HTTPError):  # cut while sending, once the limit is passed twice over
        response = await http.post(CHAT, content=endless())
        assert response.status_code == 413
        raise httpx2.WriteError("answered")
    await _still_works(http)


async def test_a_body_that_never_comes(core: Core, http: httpx2.AsyncClient) -> None:
    host, port = core.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = (
        f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {core.key}\r\ncontent-length: 50\r\n\r\n"
    )
    writer.write(head.encode() + b"{")
    answer = await asyncio.wait_for(reader.read(4096), 10)
    assert b" 400 " in answer.splitlines()[0]
    assert b"malformed_body" in answer
    writer.close()
    await _still_works(http)


async def test_routes_and_methods(http: httpx2.AsyncClient) -> None:
    await _refused(await http.get("/nothing"), 404, "not_found")
    await _refused(await http.get(CHAT + "/"), 404, "not_found")
    response = await http.get(CHAT)
    await _refused(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "POST"
    await _refused(await http.get("/openapi.json"), 404, "not_found")
    await _still_works(http)


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/tiny", CHAT, "/v1/completions", "/metrics"])
@pytest.mark.parametrize(
    "header", [None, "Bearer wrong", "Bearer", "Basic a2V5", "key-of-acme", "Bearer " + "x" * 5000]
)
async def test_every_route_wants_a_key(core: Core, path: str, header: str | None) -> None:
    headers = {} if header is None else {"authorization": header}
    async with httpx2.AsyncClient(base_url=core.url, headers=headers) as client:
        method = "POST" if "completions" in path else "GET"
        response = await client.request(method, path, content=b"{}" if method == "POST" else None)
    await _refused(response, 401, "invalid_api_key")
    assert response.headers["www-authenticate"] == "Bearer"


async def test_open_routes(core: Core) -> None:
    async with httpx2.AsyncClient(base_url=core.url) as client:
        assert (await client.get("/healthz")).json() == {"status": "ok"}
        assert (await client.get("/readyz")).json() == {"status": "ready"}
