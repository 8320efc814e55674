"""Requests with pictures through the edge: rebuilt whole, cached by their pixels, sent to cores that see."""

from __future__ import annotations

import base64
import io
import json
import random
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any

import aiohttp

from edge.harness import CoreProcess, ask, edge_toml, eventually, session_to, start_core, start_edge

_seeds = count(90_000)


def picture(num_bytes: int, seed: int) -> dict[str, Any]:
    data = random.Random(seed).randbytes(num_bytes)  # what is in it is the core's business
    return {
        "type": "image_url",
        "image_url": {"url": "data:image/png;base64," + base64.b64encode(data).decode()},
    }


def chat(*parts: dict[str, Any], **fields: Any) -> dict[str, Any]:
    content = [{"type": "text", "text": "{}"}, *parts]
    return {"model": "shop", "messages": [{"role": "user", "content": content}], **fields}


async def test_pictures_are_passed_on_as_they_are(session: aiohttp.ClientSession, core: CoreProcess) -> None:
    """Megabytes as well, with `detail`, and the parts in their order."""
    await core.log(clear=True)
    low = {"type": "image_url", "image_url": picture(50, 1)["image_url"] | {"detail": "low"}}
    request = chat(picture(5_000_000, 2), {"type": "text", "text": " "}, low)
    body = io.BytesIO(json.dumps(request).encode())
    async with session.post("/v1/chat/completions", data=body) as response:
        assert response.status == 200
    (sent_on,) = await core.log(clear=True)
    assert sent_on["body"]["messages"] == request["messages"]


async def test_a_url_to_fetch_is_refused(session: aiohttp.ClientSession, core: CoreProcess) -> None:
    await core.log(clear=True)
    remote = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/cat.png"}}
    status, body, _ = await ask(session, chat(remote))
    assert (status, body["error"]["param"]) == (400, "messages[0].content[1].image_url.url")
    assert await core.log() == []


async def test_the_cache_tells_pictures_apart(session: aiohttp.ClientSession, core: CoreProcess) -> None:
    fields = {"temperature": 0, "seed": next(_seeds)}
    first, second = picture(2000, 1), picture(2000, 2)
    low = {"type": "image_url", "image_url": first["image_url"] | {"detail": "low"}}
    digest_of_first = {"type": "image_url", "image_url": {"url": _as_in_the_key(first)}}
    await core.log(clear=True)
    different = [
        (first,),
        (second,),
        (first, second),
        (second, first),
        (first, first),
        (low,),
        (digest_of_first,),
    ]
    for parts in different:
        _, body, _ = await ask(session, chat(*parts, **fields))
        assert not body["longshore"].get("cached")
    assert len(await core.log(clear=True)) == len(different)
    for parts in different:
        _, body, _ = await ask(session, chat(*parts, **fields))
        assert body["longshore"]["cached"]
    assert await core.log() == []


def _as_in_the_key(part: dict[str, Any]) -> str:
    return "data:image/sha256," + sha256(part["image_url"]["url"].encode()).hexdigest()


async def test_only_cores_that_see_get_pictures(tmp_path: Path) -> None:
    with (
        start_core("reader", modalities=["text"]) as reader,
        start_core("seer", modalities=["text", "image"]) as seer,
        start_edge(tmp_path, edge_toml([reader, seer])) as edge,
    ):
        async with session_to(edge) as session:
            for number in range(6):
                request = chat(picture(100, number), stream=number % 2 == 0)
                async with session.post("/v1/chat/completions", json=request) as response:
                    assert response.status == 200
                    await response.read()
            assert len(await seer.log(clear=True)) == 6
            assert await reader.log() == []

            await seer.set(modalities=["text"])

            async def is_refused() -> bool:
                status, body, _ = await ask(session, chat(picture(100, 7)))
                error = body.get("error") or {}
                return (status, error.get("code"), error.get("param")) == (
                    400, "unsupported_parameter", "messages[0].content[1].image_url"
                )  # fmt: skip

            await eventually(is_refused)
            assert (await ask(session, chat()))[0] == 200
