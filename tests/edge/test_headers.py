"""What crosses the edge: headers rebuilt both ways, ids and trace kept, the tenant only by assertion."""

from __future__ import annotations

import time

import aiohttp

from edge.harness import KEY, SIGNING_KEY, CoreProcess, ask, chat
from longshore.signing import verify_assertion

TRACE = "00-" + "1" * 32 + "-" + "2" * 16 + "-01"
ID = "0123456789abcdef" * 2


async def test_only_known_headers_reach_the_core(session: aiohttp.ClientSession, core: CoreProcess) -> None:
    await core.log(clear=True)
    await ask(
        session,
        chat(),
        **{
            "Cookie": "secret=1",
            "X-Evil": "1",
            "Connection": "keep-alive, X-Evil",
            "TE": "trailers",
            "Proxy-Authorization": "Basic x",
            "longshore-assertion": "forged.token",
            "x-forwarded-for": "1.2.3.4",
        },
    )
    (arrived,) = await core.log()
    names = {name.lower() for name in arrived["headers"]}
    assert names == {
        "host",
        "content-type",
        "accept",
        "content-length",
        "longshore-assertion",
        "x-request-id",
    }
    assert KEY not in str(arrived)
    assertion = verify_assertion(
        arrived["headers"]["longshore-assertion"],
        {"edge-1": SIGNING_KEY.public_key},
        audience="core",
        now_s=time.time(),
    )
    assert (assertion.tenant, assertion.best_lane) == ("acme", "standard")


async def test_the_cores_headers_stay_there(session: aiohttp.ClientSession) -> None:
    async with session.post("/v1/chat/completions", json=chat(stream=True)) as response:
        await response.read()
    assert "x-secret-of-core" not in response.headers


async def test_request_id_and_trace_are_kept(session: aiohttp.ClientSession, core: CoreProcess) -> None:
    await core.log(clear=True)
    _, body, headers = await ask(session, chat(), **{"x-request-id": ID, "traceparent": TRACE})
    assert headers["x-request-id"] == body["longshore"]["request_id"] == ID
    (arrived,) = await core.log()
    assert arrived["body"]["longshore"] == {"request_id": ID, "traceparent": TRACE}
    assert (arrived["headers"]["X-Request-ID"], arrived["headers"]["traceparent"]) == (ID, TRACE)


async def test_ids_and_traces_that_are_none_are_replaced(
    session: aiohttp.ClientSession, core: CoreProcess
) -> None:
    await core.log(clear=True)
    _, _, headers = await ask(session, chat(), **{"x-request-id": "x" * 500, "traceparent": "junk"})
    assert len(headers["x-request-id"]) == 32
    (arrived,) = await core.log()
    assert "traceparent" not in arrived["body"]["longshore"]


async def test_no_key_and_bad_key(session: aiohttp.ClientSession) -> None:
    for authorization in ("", "Bearer", "Bearer wrong", "Basic dGVzdA==", f"bearer{KEY}", "Bearer \xff"):
        status, body, headers = await ask(session, chat(), Authorization=authorization)
        assert (status, body["error"]["code"]) == (401, "invalid_api_key")
        assert headers["www-authenticate"] == "Bearer"
    async with session.get("/v1/models", headers={"Authorization": "x"}) as response:
        assert response.status == 401


async def test_a_lane_above_the_keys_is_refused(session: aiohttp.ClientSession) -> None:
    status, body, _ = await ask(session, chat(longshore={"lane": "vip"}))
    assert (status, body["error"]["param"]) == (403, "longshore.lane")
    assert (await ask(session, chat(longshore={"lane": "batch"})))[0] == 200
