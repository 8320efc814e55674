"""HTTP/1.1, HTTP/2 and the edge's assertion on one port; ids, marks, reports and continuations."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx2
import pytest

from longshore.signing import PrivateKey, sign_assertion
from longshore.sse import SseDecoder
from longshore.wire import ASSERTION_HEADER, Assertion, TokenEvent, new_request_id
from longshore.wire.render import AnswerCollector, ChunkReader

from .conftest import Core, chat, long_chat, metric

CHAT = "/v1/chat/completions"


async def _events(http: httpx2.AsyncClient, body: dict[str, Any]) -> tuple[list[Any], bool]:
    """The events of a streamed answer, and whether it ended in [DONE]."""
    decoder, reader, events, done = SseDecoder(), ChunkReader(body.get("n", 1)), [], False
    async with http.stream("POST", CHAT, json=body | {"stream": True}) as response:
        assert response.status_code == 200, await response.aread()
        assert response.headers["content-type"].startswith("text/event-stream")
        async for data in response.aiter_bytes():
            for event in decoder.feed(data):
                if event.is_done:
                    done = True
                else:
                    assert event.event == "message", event.data
                    events += reader.read(json.loads(event.data))
    reader.finish()
    return events, done


@pytest.mark.parametrize("http2", [False, True])
async def test_both_versions_answer_and_stream(core: Core, http2: bool) -> None:
    async with httpx2.AsyncClient(
        base_url=core.url, headers=core.headers, http1=not http2, http2=http2
    ) as http:
        whole = await http.post(CHAT, json=chat(max_tokens=20))
        assert whole.http_version == ("HTTP/2" if http2 else "HTTP/1.1")
        events, done = await _events(http, chat(max_tokens=20))
    assert done
    text = "".join(event.text for event in events)
    assert text == whole.json()["choices"][0]["message"]["content"]


async def test_marks_and_report(http: httpx2.AsyncClient) -> None:
    events, _ = await _events(http, chat(max_tokens=30, temperature=1, seed=5))
    tokens = [event for event in events if isinstance(event, TokenEvent)]
    num_bytes = 0
    for offset, event in enumerate(tokens):
        assert event.mark.offset == offset
        assert event.mark.byte_offset == num_bytes
        assert event.mark.segment == 0
        num_bytes += len(event.text.encode())
    report = events[-1].report
    assert (report.served_by, report.node, report.resumed) == ("core", "core-test", False)
    (hop,) = report.hops
    assert 0 <= hop.queue_ms <= hop.ttft_ms <= hop.total_ms
    assert events[-1].usage.completion_tokens == 30


@pytest.mark.parametrize("cut", [0, 1, 7, 29, 30])
@pytest.mark.parametrize("with_stop", [False, True])
async def test_a_continued_answer_is_the_undisturbed_one(
    http: httpx2.AsyncClient, cut: int, with_stop: bool
) -> None:
    body = chat(max_tokens=30, temperature=0.9, seed=11, frequency_penalty=0.5)
    whole, _ = await _events(http, body)
    if with_stop:  # one that ends the answer, over several tokens, and one that only seems to come
        text = "".join(event.text for event in whole)
        body["stop"] = [text[-40:-28], text[10:13] + "\N{SNOWMAN}"]
        whole, _ = await _events(http, body)
        assert whole[-1].finish_reason == "stop"
    tokens = [event for event in whole if isinstance(event, TokenEvent)]
    before = tokens[:cut]
    continuation = {
        "token_ids": [event.mark.token_id for event in before],
        "segment": 1,
        "model_digest": tokens[0].mark.model_digest,
    }
    rest, done = await _events(http, body | {"longshore": {"continue_from": continuation}})
    assert done
    rest_tokens = [event for event in rest if isinstance(event, TokenEvent)]
    assert [(e.mark.offset, e.mark.token_id, e.mark.byte_offset, e.text) for e in before + rest_tokens] == [
        (e.mark.offset, e.mark.token_id, e.mark.byte_offset, e.text) for e in tokens
    ]
    assert all(event.mark.segment == 1 for event in rest_tokens)
    assert rest[-1].text == whole[-1].text
    assert rest[-1].finish_reason == whole[-1].finish_reason
    assert rest[-1].usage.prompt_tokens == whole[-1].usage.prompt_tokens
    assert rest[-1].usage.completion_tokens == whole[-1].usage.completion_tokens
    assert rest[-1].report.resumed
    assert rest[-1].report.segments[0].offset == len(before)


async def test_another_models_answer_goes_on_from_its_text(http: httpx2.AsyncClient) -> None:
    continuation = {
        "token_ids": [1, 2, 3],
        "text": "The lamp \u00e9",
        "segment": 2,
        "model_digest": "ab" * 32,
    }
    body = chat(max_tokens=8, longshore={"continue_from": continuation})
    events, done = await _events(http, body)
    assert done
    assert [event.mark.offset for event in events[:-1]] == [3, 4, 5, 6, 7]
    assert events[0].mark.byte_offset == len("The lamp \u00e9".encode())
    assert events[0].mark.segment == 2
    assert events[-1].usage.completion_tokens == 8
    del continuation["text"]
    response = await http.post(CHAT, json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (410, "resume_unavailable")


async def test_ids_are_kept_and_must_differ(http: httpx2.AsyncClient) -> None:
    request_id = new_request_id()
    response = await http.post(CHAT, json=chat(), headers={"x-request-id": request_id})
    assert response.headers["x-request-id"] == request_id
    assert response.json()["longshore"]["request_id"] == request_id
    response = await http.post(CHAT, json=chat(), headers={"x-request-id": "not ours"})
    assert len(response.headers["x-request-id"]) == 32
    body = long_chat(stream=True, longshore={"request_id": request_id})
    async with http.stream("POST", CHAT, json=body) as first:
        assert first.headers["x-request-id"] == request_id
        second = await http.post(CHAT, json=chat(longshore={"request_id": request_id}))
        assert (second.status_code, second.json()["error"]["code"]) == (409, "duplicate_request")
        assert second.headers["x-request-id"] == request_id


async def test_a_deadline_in_mid_stream_ends_in_an_error_event(http: httpx2.AsyncClient) -> None:
    body = long_chat(stream=True, longshore={"deadline_ms": 400})
    decoder, events = SseDecoder(), []
    async with http.stream("POST", CHAT, json=body) as response:
        async for data in response.aiter_bytes():
            events += decoder.feed(data)
    assert response.status_code == 200
    assert events[-1].event == "error"
    error = json.loads(events[-1].data)["error"]
    assert error["code"] == "deadline_exceeded"
    assert error["tokens_delivered"] == len(events) - 1
    assert not any(event.is_done for event in events)


def _assertion(key: PrivateKey, **changes: Any) -> dict[str, str]:
    now_s = int(time.time())
    fields = {"issuer": "edge-1", "audience": "core", "tenant": "acme", "issued_at": now_s}
    fields |= {"expires_at": now_s + 30}
    return {ASSERTION_HEADER: sign_assertion(Assertion(**(fields | changes)), key)}


async def test_an_edges_assertion_stands_for_a_key(core: Core) -> None:
    async with httpx2.AsyncClient(base_url=core.url) as http:
        good = await http.post(CHAT, json=chat(), headers=_assertion(core.edge_key))
        assert good.status_code == 200
        vip = chat(longshore={"lane": "vip"})
        assert (await http.post(CHAT, json=vip, headers=_assertion(core.edge_key))).status_code == 403
        headers = _assertion(core.edge_key, best_lane="vip", max_tokens=4)
        assert (await http.post(CHAT, json=vip, headers=headers)).status_code == 200
        assert (await http.post(CHAT, json=chat(max_tokens=5), headers=headers)).status_code == 403
        for bad in (
            _assertion(PrivateKey.generate()),
            _assertion(core.edge_key, audience="edge"),
            _assertion(core.edge_key, expires_at=int(time.time()) - 30, issued_at=int(time.time()) - 60),
            {ASSERTION_HEADER: "x.y", "authorization": f"Bearer {core.key}"},
        ):
            assert (await http.post(CHAT, json=chat(), headers=bad)).status_code == 401


async def test_metrics_tell_of_requests(http: httpx2.AsyncClient) -> None:
    async def counts() -> list[float]:
        return [
            await metric(http, "vllm:time_to_first_token_seconds_count"),
            await metric(http, "vllm:e2e_request_latency_seconds_count"),
            await metric(http, "vllm:generation_tokens_total"),
            await metric(http, "vllm:request_success_total", finished_reason="length"),
            await metric(http, "longshore:errors_total", code="model_not_found"),
        ]

    before = await counts()
    await http.post(CHAT, json=chat(max_tokens=5))
    await http.post(CHAT, json=chat(model="nobody"))
    after = await counts()
    assert [new - old for new, old in zip(after, before, strict=True)] == [1, 1, 5, 1, 1]
    text = (await http.get("/metrics")).text
    for name in (
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:gpu_cache_usage_perc",
        "vllm:inter_token_latency_seconds_bucket",
        "vllm:request_queue_time_seconds_bucket",
        "vllm:prompt_tokens_total",
        "vllm:prefix_cache_queries_total",
        "vllm:prefix_cache_hits_total",
        "longshore:requests_cancelled_total",
        "# TYPE longshore:gpu_memory_used_bytes gauge",
    ):
        assert name in text, name
    assert "nobody" not in text, "a label came from a client"


async def test_prefix_cache_is_the_tenants_own(core: Core) -> None:
    body = chat("The same long beginning of a prompt, " * 8)

    async def cached(headers: dict[str, str]) -> int:
        async with httpx2.AsyncClient(base_url=core.url, headers=headers) as http:
            usage = (await http.post(CHAT, json=body)).json()["usage"]
        return int(usage.get("prompt_tokens_details", {}).get("cached_tokens", 0))

    vip = {"authorization": f"Bearer {core.vip_key}"}
    assert await cached(core.headers) == 0
    assert await cached(core.headers) > 0
    assert await cached(vip) == 0


async def test_n_choices_streamed_are_those_of_the_whole_answer(http: httpx2.AsyncClient) -> None:
    body = chat(n=3, seed=4, temperature=1, max_tokens=10)
    events, done = await _events(http, body)
    assert done
    collector = AnswerCollector(3)
    for event in events:
        collector.add(event)
    whole = (await http.post(CHAT, json=body)).json()
    assert [collector.text(index) for index in range(3)] == [
        choice["message"]["content"] for choice in whole["choices"]
    ]
