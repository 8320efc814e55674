"""The plain way through: whole answers and streams, chat and completions, reports, models, errors."""

from __future__ import annotations

import io
import json

import aiohttp

from edge.harness import CoreProcess, ask, chat, report_of, stream, text_of
from longshore.wire import Report, decode


async def test_whole_answer(session: aiohttp.ClientSession) -> None:
    status, body, headers = await ask(session, chat())
    assert status == 200
    assert body["choices"][0]["message"]["content"] == "w0 w1 w2 w3 "
    report = decode(Report, body["longshore"])
    assert (report.served_by, report.node, report.request_id) == ("core", "core-a", headers["x-request-id"])
    assert [hop.tier for hop in report.hops] == ["edge", "core"]
    assert report.hops[0].total_ms >= report.hops[0].ttft_ms > 0
    assert [(attempt.outcome, attempt.node) for attempt in report.attempts] == [("served", "core-a")]
    assert "core-a" in report.reason


async def test_stream(session: aiohttp.ClientSession) -> None:
    events = await stream(session, chat(orders={"tokens": 9}, stream_options={"include_usage": True}))
    assert events[-1].is_done
    assert text_of(events) == "".join(f"w{offset} " for offset in range(9))
    chunks = [json.loads(event.data) for event in events[:-1]]
    assert [chunk["longshore"]["mark"]["offset"] for chunk in chunks[:9]] == list(range(9))
    assert chunks[-1]["usage"]["completion_tokens"] == 9
    report = decode(Report, report_of(events))
    assert [hop.tier for hop in report.hops] == ["edge", "core"]
    assert [attempt.outcome for attempt in report.attempts] == ["served"]


async def test_stream_of_several_choices(session: aiohttp.ClientSession) -> None:
    events = await stream(session, chat(n=3))
    assert events[-1].is_done
    assert text_of(events) == "w0 w1 w2 w3 " * 3


async def test_completions(session: aiohttp.ClientSession) -> None:
    status, body, _ = await ask(session, {"model": "shop", "prompt": "x"}, "/v1/completions")
    assert status == 200
    assert body["choices"][0]["text"] == "w0 w1 w2 w3 "
    events = await stream(session, {"model": "shop", "prompt": "x"}, "/v1/completions")
    assert events[-1].is_done


async def test_text_that_looks_like_the_protocol_passes_unharmed(session: aiohttp.ClientSession) -> None:
    text = '"finish_reason":null "report": data: {\n\nevent: error\n\n "mark": [DONE] \r\n\u2028 \\'
    events = await stream(session, chat(orders={"text": text}))
    assert events[-1].is_done
    assert text_of(events) == text * 4


async def test_models(session: aiohttp.ClientSession) -> None:
    async with session.get("/v1/models") as response:
        assert [card["id"] for card in (await response.json())["data"]] == ["shop"]
    async with session.get("/v1/models/shop") as response:
        assert response.status == 200
    async with session.get("/v1/models/none") as response:
        assert response.status == 404


async def test_unknown_model_is_404(session: aiohttp.ClientSession) -> None:
    status, body, _ = await ask(session, chat(model="nobody"))
    assert (status, body["error"]["code"]) == (404, "model_not_found")


async def test_a_refusal_of_the_core_keeps_its_type(session: aiohttp.ClientSession) -> None:
    orders = {"status": 400, "code": "context_length_exceeded"}
    for is_stream in (False, True):
        status, body, _ = await ask(session, chat(orders=orders, stream=is_stream))
        assert (status, body["error"]["code"]) == (400, "context_length_exceeded")


async def test_bad_input_is_typed_and_the_next_request_works(session: aiohttp.ClientSession) -> None:
    cases: list[tuple[bytes, str]] = [
        (b"{", "malformed_body"),
        (b'{"model": "shop", "messages": [], "temperature": NaN}', "malformed_body"),
        (json.dumps(chat(temprature=1)).encode(), "unknown_parameter"),
        (json.dumps(chat(temperature=9)).encode(), "out_of_range"),
        (json.dumps(chat(tools=[])).encode(), "unsupported_parameter"),
        (b"[]", "malformed_body"),
        (b"\xff\xfe", "malformed_body"),
        (b"", "malformed_body"),
    ]
    for body, code in cases:
        async with session.post("/v1/chat/completions", data=body) as response:
            assert (response.status, (await response.json())["error"]["code"]) == (400, code)
    assert (await ask(session, chat()))[0] == 200


async def test_body_over_the_limit(session: aiohttp.ClientSession) -> None:
    async def chunks():
        for _ in range(9):
            yield b"x" * 2**20

    async with session.post("/v1/chat/completions", data=io.BytesIO(b" " * (8 * 2**20 + 1))) as response:
        assert response.status == 413
    async with session.post("/v1/chat/completions", data=chunks()) as response:  # no content-length
        assert response.status == 413
    assert (await ask(session, chat()))[0] == 200


async def test_a_large_request_is_passed_on(session: aiohttp.ClientSession, core: CoreProcess) -> None:
    await core.log(clear=True)
    body = chat()
    body["messages"].insert(0, {"role": "user", "content": "é" * 2**20})
    async with session.post("/v1/chat/completions", data=io.BytesIO(json.dumps(body).encode())) as response:
        assert response.status == 200
    (sent_on,) = await core.log(clear=True)
    assert sent_on["body"]["messages"] == body["messages"]


async def test_routes_and_methods(session: aiohttp.ClientSession) -> None:
    async with session.get("/nowhere") as response:
        assert (response.status, (await response.json())["error"]["code"]) == (404, "not_found")
    async with session.get("/v1/chat/completions") as response:
        assert (response.status, (await response.json())["error"]["code"]) == (405, "method_not_allowed")
    async with session.get("/readyz") as response:
        assert response.status == 200
    async with session.get("/healthz") as response:
        assert response.status == 200


async def test_device_only_is_refused(session: aiohttp.ClientSession) -> None:
    status, body, _ = await ask(session, chat(longshore={"privacy": "device-only"}))
    assert (status, body["error"]["code"]) == (403, "permission_denied")


async def test_deadline(session: aiohttp.ClientSession, core: CoreProcess) -> None:
    status, body, _ = await ask(session, chat(orders={"wait_s": 30}, longshore={"deadline_ms": 200}))
    assert (status, body["error"]["code"]) == (504, "deadline_exceeded")
    await core.log(clear=True)
    await ask(session, chat(longshore={"deadline_ms": 5000}))
    sent_on = (await core.log())[-1]["body"]["longshore"]["deadline_ms"]
    assert 4000 < sent_on < 5000


async def test_deadline_in_a_stream_is_an_error_event(session: aiohttp.ClientSession) -> None:
    events = await stream(session, chat(orders={"stall_after": 2}, longshore={"deadline_ms": 300}))
    assert events[-1].event == "error"
    error = json.loads(events[-1].data)["error"]
    assert (error["code"], error["tokens_delivered"]) == ("deadline_exceeded", 2)


async def test_metrics(session: aiohttp.ClientSession) -> None:
    await ask(session, chat())
    async with session.get("/metrics") as response:
        text = await response.text()
    assert 'longshore:edge_requests_total{outcome="served"}' in text
    assert 'longshore:edge_attempts_total{core="core-a",outcome="served"}' in text
