"""Pages of other origins: the named ones may call, others see no permission; a key is needed as ever."""

from __future__ import annotations

from collections.abc import Iterator

import aiohttp
import pytest

from edge.harness import CoreProcess, chat, edge_toml, session_to, start_edge
from longshore.tier_process import TierProcess

PAGE = "https://shop.example"
ALLOW = "access-control-allow-origin"
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def open_edge(core: CoreProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TierProcess]:
    toml = edge_toml([core], f'allowed_origins = ["{PAGE}"]')
    with start_edge(tmp_path_factory.mktemp("cors"), toml) as process:
        yield process


async def test_a_preflight_of_a_named_origin_is_answered_without_a_key(open_edge: TierProcess) -> None:
    async with (
        aiohttp.ClientSession(open_edge.url) as session,
        session.options(CHAT, headers={"Origin": PAGE, "Access-Control-Request-Method": "POST"}) as response,
    ):
        assert response.status == 204
        assert response.headers[ALLOW] == PAGE
        assert "authorization" in response.headers["access-control-allow-headers"]
        assert "range" in response.headers["access-control-allow-headers"]


@pytest.mark.parametrize("is_stream", [False, True])
async def test_answers_and_errors_can_be_read_by_the_page(open_edge: TierProcess, is_stream: bool) -> None:
    async with session_to(open_edge, Origin=PAGE) as session:
        async with session.post(CHAT, json=chat(stream=is_stream)) as response:
            assert (response.status, response.headers[ALLOW]) == (200, PAGE)
            assert await response.read()
        async with session.post(CHAT, json={}) as response:
            assert (response.status, response.headers[ALLOW]) == (400, PAGE)
    async with (
        aiohttp.ClientSession(open_edge.url, headers={"Origin": PAGE}) as session,
        session.post(CHAT, json=chat()) as response,
    ):
        assert (response.status, response.headers[ALLOW]) == (401, PAGE)


async def test_another_origin_is_given_no_permission(open_edge: TierProcess) -> None:
    async with session_to(open_edge, Origin="https://other.example") as session:
        async with session.post(CHAT, json=chat()) as response:
            assert response.status == 200 and ALLOW not in response.headers
        async with session.options(CHAT) as response:
            assert response.status == 405 and ALLOW not in response.headers


async def test_without_the_setting_no_page_may_call(edge: TierProcess) -> None:
    async with session_to(edge, Origin=PAGE) as session, session.post(CHAT, json=chat()) as response:
        assert response.status == 200 and ALLOW not in response.headers
