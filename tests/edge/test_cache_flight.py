"""The exact cache over real sockets: hits, single-flight, tenants, streams replayed, workers, restarts."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from edge.harness import (
    KEY,
    OTHER_KEY,
    CoreProcess,
    ask,
    chat,
    edge_toml,
    report_of,
    session_to,
    start_core,
    start_edge,
    stream,
    text_of,
)

_number = iter(range(10_000, 20_000))


def fresh(**changes: Any) -> dict[str, Any]:
    """A deterministic request that no other test has asked."""
    return chat(seed=next(_number), temperature=0, **changes)


async def test_whole_answer_is_replayed(session: aiohttp.ClientSession, core: CoreProcess) -> None:
    request = fresh()
    _, first, _ = await ask(session, request)
    await core.log(clear=True)
    _, second, headers = await ask(session, request | {"longshore": {"deadline_ms": 9000}, "user": "u"})
    assert await core.log() == []
    assert second["choices"] == first["choices"] and second["usage"] == first["usage"]
    report = second["longshore"]
    assert (report["served_by"], report["node"], report["cached"]) == ("edge", "edge-1", True)
    assert report["request_id"] == headers["x-request-id"] != first["longshore"]["request_id"]
    assert second["id"] == "chatcmpl-" + report["request_id"]
    assert report["model_digest"] == first["longshore"]["model_digest"]
    assert [hop["tier"] for hop in report["hops"]] == ["edge"]
    assert "cache" in report["reason"]


async def test_stream_is_replayed_as_a_stream(session: aiohttp.ClientSession, core: CoreProcess) -> None:
    request = fresh(orders={"tokens": 6, "text": '\u0000é"\\chatcmpl-'})
    first = await stream(session, request)
    await core.log(clear=True)
    second = await stream(session, request)
    assert await core.log() == []
    assert second[-1].is_done and text_of(second) == text_of(first)
    chunks = [json.loads(event.data) for event in second[:-1]]
    assert [chunk["longshore"]["mark"]["offset"] for chunk in chunks[:6]] == list(range(6))
    report = report_of(second)
    assert report["cached"] is True
    assert {chunk["id"] for chunk in chunks} == {"chatcmpl-" + report["request_id"]}


async def test_a_stored_stream_answers_a_whole_request(
    session: aiohttp.ClientSession, core: CoreProcess
) -> None:
    request = fresh()
    events = await stream(session, request)
    await core.log(clear=True)
    _, body, _ = await ask(session, request)
    assert await core.log() == []
    assert body["choices"][0]["message"]["content"] == text_of(events)
    assert body["longshore"]["cached"] is True
    assert body["usage"]["completion_tokens"] == 4


async def test_only_deterministic_requests(session: aiohttp.ClientSession, core: CoreProcess) -> None:
    await core.log(clear=True)
    for _ in range(2):
        await ask(session, chat())
    assert len(await core.log()) == 2


async def test_errors_are_not_stored(session: aiohttp.ClientSession, core: CoreProcess) -> None:
    request = fresh()
    await core.set(status=400)
    assert (await ask(session, request))[0] == 400
    await core.set()
    assert (await ask(session, request))[0] == 200


@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
async def test_single_flight(session: aiohttp.ClientSession, core: CoreProcess, is_stream: bool) -> None:
    await core.log(clear=True)
    request = fresh(orders={"wait_s": 0.3})
    if is_stream:
        answers = await asyncio.gather(*(stream(session, request) for _ in range(8)))
        assert {text_of(events) for events in answers} == {"w0 w1 w2 w3 "}
        reports = [report_of(events) for events in answers]
    else:
        replies = await asyncio.gather(*(ask(session, request) for _ in range(8)))
        reports = [body["longshore"] for _, body, _ in replies]
    assert len(await core.log()) == 1
    assert sum(report.get("cached", False) for report in reports) == 7
    assert len({report["request_id"] for report in reports}) == 8


async def test_followers_outlive_the_leaders_departure(
    session: aiohttp.ClientSession, core: CoreProcess
) -> None:
    await core.log(clear=True)
    request = fresh(orders={"wait_s": 0.5})
    leader = asyncio.create_task(ask(session, request))
    await asyncio.sleep(0.15)
    followers = [asyncio.create_task(ask(session, request)) for _ in range(3)]
    await asyncio.sleep(0.15)
    leader.cancel()
    replies = await asyncio.gather(*followers)
    assert [status for status, _, _ in replies] == [200] * 3
    assert [record["ended"] for record in await core.log()] == ["disconnected", "whole"]


async def test_followers_outlive_the_leaders_failure(
    session: aiohttp.ClientSession, core: CoreProcess
) -> None:
    await core.set(status=500, code="internal_error", wait_s=0.4)
    request = fresh()
    leader = asyncio.create_task(ask(session, request))
    await asyncio.sleep(0.15)
    followers = [asyncio.create_task(ask(session, request)) for _ in range(3)]
    await asyncio.sleep(0.1)
    await core.set()
    assert (await leader)[0] == 503
    assert [status for status, _, _ in await asyncio.gather(*followers)] == [200] * 3


async def test_a_follower_keeps_its_own_deadline(session: aiohttp.ClientSession) -> None:
    request = fresh(orders={"wait_s": 1.0})
    leader = asyncio.create_task(ask(session, request))
    await asyncio.sleep(0.1)
    status, body, _ = await ask(session, request | {"longshore": {"deadline_ms": 150}})
    assert (status, body["error"]["code"]) == (504, "deadline_exceeded")
    assert (await leader)[0] == 200


async def test_tenants_workers_restarts_and_cores_that_are_down(tmp_path: Path) -> None:
    """What one worker stored another serves, also after a restart and with the core gone; never to others."""
    other = f'[[keys]]\ntenant = "other"\nkey_sha256 = "{hashlib.sha256(OTHER_KEY.encode()).hexdigest()}"\n'
    request = fresh()
    with start_core("core-a") as core:
        toml = edge_toml([core], f'workers = 2\ncache_path = "{tmp_path}/cache.sqlite"', other)
        with start_edge(tmp_path, toml) as edge:
            assert await ask_on_fresh_connections(edge.url, KEY, request, 1) == {False}
            await asyncio.sleep(0.3)  # the disk follows behind
            assert await ask_on_fresh_connections(edge.url, KEY, request, 12) == {True}
            assert len(await core.log()) == 1
            assert await ask_on_fresh_connections(edge.url, OTHER_KEY, request, 1) == {False}
        with start_edge(tmp_path, toml) as edge:
            assert await ask_on_fresh_connections(edge.url, KEY, request, 4) == {True}
            core.kill()
            await asyncio.sleep(0.5)
            assert await ask_on_fresh_connections(edge.url, KEY, request, 4) == {True}


async def test_an_edge_that_starts_while_the_core_is_down_still_finds_its_answers(tmp_path: Path) -> None:
    request = fresh()
    with start_core("core-a") as core:
        toml = edge_toml([core], f'workers = 2\ncache_path = "{tmp_path}/cache.sqlite"')
        with start_edge(tmp_path, toml) as edge:
            assert await ask_on_fresh_connections(edge.url, KEY, request, 1) == {False}
            await asyncio.sleep(0.3)  # the disk follows behind
        core.kill()
        with start_edge(tmp_path, toml) as edge:
            assert await ask_on_fresh_connections(edge.url, KEY, request, 6) == {True}
            async with session_to(edge) as session:
                assert (await ask(session, fresh()))[0] == 503


async def test_an_old_answer_is_better_than_none(tmp_path: Path) -> None:
    request = fresh()
    with start_core("core-a") as core, start_edge(tmp_path, edge_toml([core], "cache_ttl_s = 0.2")) as edge:
        async with session_to(edge) as session:
            await ask(session, request)
            await asyncio.sleep(0.3)
            _, body, _ = await ask(session, request)
            assert not body["longshore"].get("cached")
            core.kill()
            await asyncio.sleep(0.3)
            status, body, _ = await ask(session, request)
            assert (status, body["longshore"]["cached"]) == (200, True)
            assert "cores failed, stale cache" in body["longshore"]["reason"]
            assert (await ask(session, fresh()))[0] == 503


@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
async def test_sampled_answers_are_kept_for_the_last_resort(tmp_path: Path, is_stream: bool) -> None:
    request = chat(temperature=1.0)

    async def report(session: aiohttp.ClientSession) -> dict[str, Any]:
        if is_stream:
            return report_of(await stream(session, request))
        return (await ask(session, request))[1]["longshore"]

    with (
        start_core("core-a") as core,
        start_edge(tmp_path, edge_toml([core], 'cache_sampled = "last-resort"')) as edge,
    ):
        async with session_to(edge) as session:
            for _ in range(2):
                assert not (await report(session)).get("cached")
            core.kill()
            await asyncio.sleep(0.3)
            assert (await report(session))["cached"]


async def ask_on_fresh_connections(url: str, key: str, request: Any, count: int) -> set[bool]:
    """Whether the answers were cached, each over a connection of its own, so that every worker is met."""
    found = set()
    for _ in range(count):
        async with session_to(url, Authorization=f"Bearer {key}") as session:
            status, body, _ = await ask(session, request)
            assert status == 200, body
            found.add(body["longshore"].get("cached", False))
    return found
