"""Before the first byte a failure is tried elsewhere; after it, and for requests at fault, never."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from edge.harness import (
    CoreProcess,
    ask,
    chat,
    edge_toml,
    eventually,
    report_of,
    session_to,
    start_core,
    start_edge,
    stream,
)
from longshore.tier_process import TierProcess

TIMES = "failure_threshold = 100\nfirst_event_timeout_s = 0.5\nidle_timeout_s = 0.7"


@pytest.fixture(scope="module")
def bad() -> Iterator[CoreProcess]:
    with start_core("bad") as process:
        yield process


@pytest.fixture(scope="module")
def two_cores(
    bad: CoreProcess, core: CoreProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TierProcess]:
    # The bad core has by far the greater weight, so that it is asked first.
    toml = edge_toml([bad], TIMES, core_extra="weight = 1000")
    toml += f'[[cores]]\nname = "{core.name}"\nurl = "{core.url}"\n'
    with start_edge(tmp_path_factory.mktemp("two"), toml) as process:
        yield process


@pytest.fixture
async def session_two(
    two_cores: TierProcess, bad: CoreProcess, core: CoreProcess
) -> AsyncIterator[aiohttp.ClientSession]:
    await core.set()
    await bad.set()
    async with session_to(two_cores) as session:
        yield session


@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"status": 503}, "unavailable"),
        ({"status": 429, "code": "queue_full"}, "queue_full"),
        ({"drop_before": True}, "upstream_failed"),
        ({"error_after": 0}, "engine_failed"),
    ],
    ids=["503", "429", "lost", "failed"],
)
async def test_another_core_answers(
    session_two: aiohttp.ClientSession, bad: CoreProcess, settings: Any, code: str, is_stream: bool
) -> None:
    if "error_after" in settings and not is_stream:
        settings = {"status": 500, "code": "engine_failed"}
    await bad.set(**settings)
    if is_stream:
        report = report_of(await stream(session_two, chat()))
    else:
        status, body, _ = await ask(session_two, chat())
        assert status == 200
        report = body["longshore"]
    tried = [(attempt["node"], attempt["outcome"]) for attempt in report["attempts"]]
    assert tried == [("bad", "failed"), ("core-a", "served")]
    assert code in report["attempts"][0]["reason"]


@pytest.mark.parametrize("orders", [{"wait_s": 60}, {"stall_after": 0}], ids=["silent", "headers only"])
async def test_a_core_that_says_nothing(
    session_two: aiohttp.ClientSession, bad: CoreProcess, orders: Any
) -> None:
    await bad.set(**orders)
    report = report_of(await stream(session_two, chat()))
    assert report["node"] == "core-a"
    assert "nothing came in time" in report["attempts"][0]["reason"]


async def test_a_core_that_falls_silent_in_the_middle(
    session_two: aiohttp.ClientSession, bad: CoreProcess
) -> None:
    await bad.set(stall_after=2)
    events = await stream(session_two, chat())
    assert events[-1].event == "error"
    assert "answer_interrupted" in events[-1].data


async def test_keepalives_come_before_the_first_token(
    session_two: aiohttp.ClientSession, bad: CoreProcess
) -> None:
    await bad.set(keepalive_first=True)
    assert report_of(await stream(session_two, chat()))["node"] == "bad"
    await bad.set(keepalive_first=True, error_after=0)
    assert report_of(await stream(session_two, chat()))["node"] == "core-a"


async def test_request_at_fault_is_not_tried_again(
    session_two: aiohttp.ClientSession, bad: CoreProcess, core: CoreProcess
) -> None:
    await bad.set(status=400, code="invalid_request")
    await core.log(clear=True)
    status, _, _ = await ask(session_two, chat())
    assert status == 400
    assert await core.log() == []


async def test_a_tenants_own_limit_is_not_evaded(
    session_two: aiohttp.ClientSession, bad: CoreProcess, core: CoreProcess
) -> None:
    await bad.set(status=429, code="rate_limit_exceeded")
    await core.log(clear=True)
    status, body, headers = await ask(session_two, chat())
    assert (status, body["error"]["code"], headers["retry-after"]) == (429, "rate_limit_exceeded", "7")
    assert await core.log() == []


async def test_nothing_is_tried_again_after_the_first_byte(
    session_two: aiohttp.ClientSession, bad: CoreProcess, core: CoreProcess
) -> None:
    await bad.set(cut_after=1)
    await core.log(clear=True)
    events = await stream(session_two, chat())
    assert events[-1].event == "error"
    assert await core.log() == []


async def test_a_request_that_kills_cores_visits_two_at_most(tmp_path: Path) -> None:
    with (
        start_core("a", drop_before=True) as a,
        start_core("b", drop_before=True) as b,
        start_core("c", drop_before=True) as c,
        start_edge(tmp_path, edge_toml([a, b, c])) as edge,
    ):
        async with session_to(edge) as session:
            status, body, headers = await ask(session, chat())
        assert (status, body["error"]["code"]) == (503, "no_tier_available")
        assert int(headers["retry-after"]) >= 1
        assert sum([len(await core.log()) for core in (a, b, c)]) == 2


async def test_readiness_names_what_ails_each_core(tmp_path: Path) -> None:
    with (
        start_core("well") as well,
        start_core("gone") as gone,
        start_edge(tmp_path, edge_toml([well, gone])) as edge,
    ):
        async with session_to(edge) as session:
            gone.kill()

            async def is_named() -> bool:
                async with session.get("/readyz") as response:
                    cores = (await response.json())["cores"]
                    return response.status == 200 and cores["well"] == "ready" != cores["gone"]

            await eventually(is_named)


async def test_no_core_is_there_and_then_one_is(tmp_path: Path) -> None:
    with start_core("gone") as gone:
        pass
    with start_edge(tmp_path, edge_toml([gone])) as edge:
        async with session_to(edge) as session:
            status, body, _ = await ask(session, chat())
            assert (status, body["error"]["code"]) == (503, "no_tier_available")
            async with session.get("/readyz") as response:
                assert response.status == 503
            with start_core("gone", port=gone.port):

                async def is_ready() -> bool:
                    async with session.get("/readyz") as response:
                        return response.status == 200

                await eventually(is_ready)
                assert (await ask(session, chat()))[0] == 200
