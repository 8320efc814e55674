"""Clients against live servers on every path: served, fallen back, refused, cut, late, private."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import longshore
from longshore import AsyncClient, Client
from longshore.call import Call, CallSettings, Progress, Try, Wait
from longshore.config import HttpSettings, RoutingSettings
from longshore.device import DeviceSettings, Student
from longshore.errors import (
    AnswerInterruptedError,
    AuthenticationError,
    BundleDamagedError,
    BundleError,
    ConfigError,
    ConnectionFailedError,
    DeadlineExceededError,
    EngineFailedError,
    InternalError,
    InvalidRequestError,
    LongshoreError,
    NoTierAvailableError,
    OutOfRangeError,
    OverloadedError,
    PromptTooLongError,
    ProtocolError,
    QueueFullError,
    UnavailableError,
    UnknownModelError,
    UnsupportedParameterError,
)
from longshore.measure import RetryBudget, TierMeter
from longshore.params import ChatParams, CompletionParams
from longshore.wire import (
    ChatRequest,
    CompletionRequest,
    Extension,
    FinishEvent,
    Message,
    Report,
    TokenEvent,
    TokenMark,
    decode_chat_request,
)
from sdk_python.tier_server import DIGEST, WORDS, Behaviour, SocketServer, TierServer

HTTP = HttpSettings(trust_env=False)
QUICK = RoutingSettings(backoff_base_s=0.01, backoff_cap_s=0.02, breaker_open_s=0.05)
ASK: dict[str, Any] = {"model": "shop", "messages": [{"role": "user", "content": "What does the lamp cost?"}]}
SHORT: dict[str, Any] = {**ASK, "max_tokens": 8, "ignore_eos": True}
DEVICE = DeviceSettings(calibration_s=0.01)
NOBODY = "http://127.0.0.1:9"
TEXT = "".join(WORDS)


def sync_client(**arguments: Any) -> Client:
    return Client(**{"api_key": "key", "http": HTTP, "routing": QUICK, **arguments})


def async_client(**arguments: Any) -> AsyncClient:
    return AsyncClient(**{"api_key": "key", "http": HTTP, "routing": QUICK, **arguments})


@pytest.fixture(scope="module")
def bundle_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real bundle of a random model: what it says is noise, how it says it is not."""
    from longshore_export.bundle import export_student  # brings in torch, which most tests here do without
    from tiny_models import config_of, write_model

    model_dir = write_model(tmp_path_factory.mktemp("model"), config_of("llama-tied"), seed=1)
    return export_student(model_dir, tmp_path_factory.mktemp("bundle") / "student").path


@pytest.fixture(scope="module")
def student(bundle_dir: Path) -> Iterator[Student]:
    with Student(bundle_dir, settings=DEVICE) as running:
        yield running


@pytest.fixture
def own_student(bundle_dir: Path) -> Iterator[Student]:
    """For tests that break it."""
    with Student(bundle_dir, settings=DEVICE) as running:
        yield running


def loaded(client: Client | AsyncClient) -> None:
    """Wait until the device has started."""
    end_s = time.monotonic() + 30
    while client.measurements()[-1].prefill_tokens_per_s is None and time.monotonic() < end_s:
        time.sleep(0.005)


def outcomes(report: Report | None) -> list[tuple[str, str]]:
    assert report is not None
    return [(attempt.tier, attempt.outcome) for attempt in report.attempts]


# -- the shape of OpenAI's client --------------------------------------------------------------


def test_whole_answer() -> None:
    with TierServer() as edge, sync_client(edge_url=edge.url) as client:
        answer = client.chat.completions.create(**ASK, temperature=0, request_id="cd" * 16)
    assert answer.choices[0].message.content == TEXT
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None and answer.usage.completion_tokens == len(WORDS)
    assert answer.id == "chatcmpl-" + "cd" * 16
    report = answer.longshore
    assert report is not None and report.served_by == "core" and report.request_id == "cd" * 16
    assert outcomes(report) == [("edge", "served"), ("core", "served")]
    assert [hop.node for hop in report.hops] == ["sdk", "core-1"]
    assert report.hops[0].total_ms is not None and report.hops[0].ttft_ms is not None
    sent = edge.seen[0].body
    assert sent["longshore"]["request_id"] == "cd" * 16
    assert 59_000 < sent["longshore"]["deadline_ms"] <= 60_000
    assert sent["longshore"]["ttft_target_ms"] == 300


def test_stream_of_chunks() -> None:
    with (
        TierServer() as edge,
        sync_client(edge_url=edge.url) as client,
        client.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True}) as stream,
    ):
        assert stream.report is None
        first = next(stream)
        assert first.choices[0].delta.role == "assistant" and stream.text == WORDS[0]
        rest = list(stream)
    assert (
        "".join(c.choices[0].delta.content or "" for c in [first, *rest] if c.choices) == TEXT == stream.text
    )
    assert rest[-1].choices == () and rest[-1].usage == stream.usage
    assert stream.report is not None and stream.report.attempts[-1].outcome == "served"


async def test_async_whole_answer_and_stream() -> None:
    with TierServer() as edge:
        async with async_client(edge_url=edge.url) as client:
            answer = await client.chat.completions.create(**ASK)
            stream = await client.chat.completions.create(**ASK, stream=True)
            async with stream:
                text = "".join([c.choices[0].delta.content or "" async for c in stream])
            models = await client.models.list()
    assert answer.choices[0].message.content == text == stream.text == TEXT
    assert stream.report is not None and stream.usage is not None
    assert [card.id for card in models.data] == ["shop"]


def test_completions_whole_and_streamed() -> None:
    with TierServer() as core, sync_client(core_url=core.url) as client:
        answer = client.completions.create(model="shop", prompt="The")
        chunks = list(client.completions.create(model="shop", prompt="The", stream=True))
    assert answer.choices[0].text == TEXT
    assert "".join(chunk.choices[0].text for chunk in chunks) == TEXT
    assert isinstance(answer.longshore, Report)


async def test_async_completions() -> None:
    with TierServer() as core:
        async with async_client(core_url=core.url) as client:
            answer = await client.completions.create(model="shop", prompt="The")
            stream = await client.completions.create(model="shop", prompt="The", stream=True)
            text = "".join([chunk.choices[0].text async for chunk in stream])
    assert answer.choices[0].text == text == TEXT


def test_messages_may_be_wire_types_and_tuples() -> None:
    with TierServer() as core, sync_client(core_url=core.url) as client:
        client.chat.completions.create(model="shop", messages=(Message("user", "hi"),), stop=("x", "y"))
    assert core.seen[0].body["messages"] == [{"role": "user", "content": "hi"}]
    assert core.seen[0].body["stop"] == ["x", "y"]


def test_every_field_of_the_wire_is_a_keyword_argument() -> None:
    own = {field.name for field in dataclasses.fields(Extension)} - {"continue_from"} | {"mode"}
    for cls, params in ((ChatRequest, ChatParams), (CompletionRequest, CompletionParams)):
        fields = {field.name for field in dataclasses.fields(cls)} - {"longshore", "stream"}
        names = {name for base in params.__mro__ for name in getattr(base, "__annotations__", {})}
        assert set(params.__annotations__) == fields | own
        assert names


def test_bad_arguments_are_refused_before_anything_is_sent() -> None:
    with TierServer() as core, sync_client(core_url=core.url) as client:
        create: Any = client.chat.completions.create
        with pytest.raises(TypeError, match="unexpected keyword argument 'temprature'"):
            create(**ASK, temprature=1)
        with pytest.raises(UnsupportedParameterError) as unsupported:
            create(**ASK, tools=[])
        assert unsupported.value.param == "tools"
        with pytest.raises(OutOfRangeError) as out_of_range:
            create(**ASK, temperature=9)
        assert out_of_range.value.param == "temperature"
        with pytest.raises(InvalidRequestError):
            create(model="shop")
        with pytest.raises(InvalidRequestError):
            create(**ASK, request_id="mine")
        with pytest.raises(OutOfRangeError):
            create(**ASK, deadline_ms=0)
        with pytest.raises(ConfigError, match="mode"):
            create(**ASK, mode="fastest")
    assert core.seen == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "at least one"),
        ({"edge_url": "ftp://x"}, "http://"),
        ({"edge_url": "http://x:99999"}, "URL"),
        ({"edge_url": "http://user:pw@x"}, "plain address"),
        ({"core_url": 5}, "string|iterable"),
        ({"edge_url": NOBODY, "mode": "swift"}, "mode"),
        ({"edge_url": NOBODY, "mode": "device-only"}, "device-only"),
        ({"edge_url": NOBODY, "deadline_s": 0}, "deadline_s"),
        ({"edge_url": NOBODY, "api_key": "a b\n"}, "api_key"),
        ({"edge_url": NOBODY, "device_start": "never"}, "device_start"),
    ],
)
def test_bad_settings_stop_the_construction(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises((ConfigError, TypeError), match=words):
        Client(**arguments)


def test_api_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGSHORE_API_KEY", "from-env")
    with TierServer() as core, Client(core_url=core.url + "/v1/", http=HTTP) as client:
        client.chat.completions.create(**ASK)
        assert "from-env" not in repr(client.settings)
    assert core.seen[0].headers["authorization"] == "Bearer from-env"
    assert core.seen[0].path == "/v1/chat/completions"


def test_missing_bundle_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        Client(device=tmp_path / "none")


# -- falling back before the first token -------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "behaviour",
    [
        Behaviour(error=QueueFullError("full", retry_after_s=5)),
        Behaviour(error=UnavailableError("starting")),
        Behaviour(error=EngineFailedError("died")),
        Behaviour(error=InternalError("bug")),
        Behaviour(raw=b""),
        Behaviour(stop_after=0, ending="cut"),
        Behaviour(content_type="text/html"),
    ],
)
def test_next_tier_answers_when_the_first_fails(behaviour: Behaviour, stream: bool) -> None:
    with (
        TierServer(behaviour) as edge,
        TierServer() as core,
        sync_client(edge_url=edge.url, core_url=core.url) as client,
    ):
        if stream:
            chunks = client.chat.completions.create(**ASK, stream=True)
            text, report = "".join(c.choices[0].delta.content or "" for c in chunks), chunks.report
        else:
            answer = client.chat.completions.create(**ASK)
            text, report = answer.choices[0].message.content or "", answer.longshore
    assert text == TEXT
    assert outcomes(report)[:2] == [("edge", "failed"), ("core", "served")]
    assert report is not None and report.reason.startswith("edge failed (")
    assert len(edge.seen) == len(core.seen) == 1


def test_unreachable_tiers_leave_the_device(student: Student) -> None:
    wary = RoutingSettings(breaker_open_s=20)
    with sync_client(edge_url=NOBODY, core_url="http://127.0.0.1:11", device=student, routing=wary) as client:
        begin_s = time.monotonic()
        answer = client.chat.completions.create(**SHORT, mode="prefer-core")
        took_s = time.monotonic() - begin_s
        again = client.chat.completions.create(**SHORT, mode="prefer-core")
    assert answer.usage is not None and answer.usage.completion_tokens == 8
    assert answer.longshore is not None and answer.longshore.served_by == "device"
    assert outcomes(answer.longshore) == [("core", "failed"), ("edge", "failed"), ("device", "served")]
    assert took_s < 10
    assert {("edge", "skipped"), ("core", "skipped")} <= set(outcomes(again.longshore))  # breakers are open


async def test_async_fallback_to_the_device(student: Student) -> None:
    async with async_client(edge_url=NOBODY, device=student) as client:
        answer = await client.chat.completions.create(**SHORT, temperature=0, mode="prefer-core")
        stream = await client.chat.completions.create(**SHORT, temperature=0, stream=True, mode="device-only")
        text = "".join([c.choices[0].delta.content or "" async for c in stream])
    assert outcomes(answer.longshore) == [("edge", "failed"), ("device", "served")]
    assert text == answer.choices[0].message.content == stream.text


def test_hanging_tier_leaves_the_next_one_time() -> None:
    with TierServer(Behaviour(silent=True)) as edge, TierServer() as core:
        with sync_client(edge_url=edge.url, core_url=core.url) as client:
            begin_s = time.monotonic()
            answer = client.chat.completions.create(**ASK, deadline_ms=2500, max_tokens=40)
            took_s = time.monotonic() - begin_s
        assert edge.seen[0].left_early.wait(5)
    assert answer.choices[0].message.content == TEXT
    assert outcomes(answer.longshore)[0] == ("edge", "failed")
    assert took_s < 2.5


def test_measurably_slow_tier_is_passed_over_for_the_device(student: Student) -> None:
    with (
        TierServer(Behaviour(first_delay_s=0.5)) as edge,
        sync_client(edge_url=edge.url, device=student) as client,
    ):
        loaded(client)
        first = client.chat.completions.create(**SHORT)
        second = client.chat.completions.create(**SHORT)
    assert first.longshore is not None and first.longshore.served_by == "core"
    report = second.longshore
    assert report is not None and report.served_by == "device"
    assert re.search(r"edge predicted \d+ ms > target 300 ms; device \d+ ms", report.reason)
    assert outcomes(report)[0] == ("edge", "skipped")


def test_whole_answers_are_begun_anew_when_cut_since_nothing_was_delivered() -> None:
    with (
        TierServer(Behaviour(stop_after=3)) as edge,
        TierServer() as core,
        sync_client(edge_url=edge.url, core_url=core.url) as client,
    ):
        answer = client.chat.completions.create(**ASK)
    assert answer.choices[0].message.content == TEXT
    assert outcomes(answer.longshore)[:2] == [("edge", "interrupted"), ("core", "served")]


def test_busy_tier_is_asked_again_after_its_retry_after() -> None:
    with TierServer() as core, sync_client(core_url=core.url) as client:
        core.script = [Behaviour(error=OverloadedError("busy", retry_after_s=0.2))]
        begin_s = time.monotonic()
        answer = client.chat.completions.create(**ASK)
        took_s = time.monotonic() - begin_s
    assert answer.choices[0].message.content == TEXT
    assert took_s >= 0.2
    assert outcomes(answer.longshore)[:2] == [("core", "failed"), ("core", "served")]


def test_breaker_reopens_a_tier_that_came_back() -> None:
    slower = dataclasses.replace(QUICK, breaker_open_s=1.0)
    with TierServer() as core, sync_client(core_url=core.url, routing=slower) as client:
        core.script = [Behaviour(error=UnavailableError("starting"))] * 3
        with pytest.raises(UnavailableError):
            client.chat.completions.create(**ASK)
        assert client.measurements()[0].open_for_ms > 0
        assert client.chat.completions.create(**ASK).choices[0].message.content == TEXT
        assert client.measurements()[0].open_for_ms == 0


# -- what is told at once ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [InvalidRequestError("bad", param="n"), AuthenticationError("who"), UnknownModelError("no such model")],
)
def test_a_bad_request_is_not_tried_elsewhere(error: LongshoreError) -> None:
    with (
        TierServer(Behaviour(error=error)) as edge,
        TierServer() as core,
        sync_client(edge_url=edge.url, core_url=core.url) as client,
        pytest.raises(type(error), match=error.message) as raised,
    ):
        client.chat.completions.create(**ASK, stream=True)
    assert core.seen == []
    assert [attempt.outcome for attempt in raised.value.attempts] == ["failed"]
    assert raised.value.request_id == edge.seen[0].body["longshore"]["request_id"]


def test_what_only_the_device_refuses_is_asked_elsewhere(student: Student) -> None:
    with TierServer() as core, sync_client(core_url=core.url, device=student) as client:
        beyond = {"logit_bias": {"100000": 1.0}}  # a token that the small vocabulary does not have
        answer = client.chat.completions.create(**ASK, **beyond, mode="prefer-device")  # type: ignore[arg-type]
    assert outcomes(answer.longshore)[:2] == [("device", "failed"), ("core", "served")]


def test_one_tier_alone_tells_its_own_error_and_several_are_named() -> None:
    with sync_client(core_url=NOBODY) as client, pytest.raises(ConnectionFailedError) as alone:
        client.chat.completions.create(**ASK)
    assert {attempt.tier for attempt in alone.value.attempts} == {"core"}
    with (
        TierServer(Behaviour(error=UnavailableError("down"))) as edge,
        sync_client(edge_url=edge.url, core_url=NOBODY) as client,
        pytest.raises(NoTierAvailableError) as several,
    ):
        client.chat.completions.create(**ASK)
    assert "edge failed (unavailable)" in several.value.message
    assert "core failed (connection_failed)" in several.value.message


def test_interrupted_stream_tells_how_far_it_came_and_is_not_begun_anew() -> None:
    with (
        TierServer(Behaviour(stop_after=4)) as edge,
        TierServer() as core,
        sync_client(edge_url=edge.url, core_url=core.url) as client,
    ):
        stream = client.chat.completions.create(**ASK, stream=True)
        got = []
        with pytest.raises(AnswerInterruptedError) as raised:
            for chunk in stream:
                got.append(chunk.choices[0].delta.content or "")
    assert got == list(WORDS[:4])
    assert raised.value.tokens_delivered == 4
    assert raised.value.partial_text == "".join(WORDS[:4]) == stream.text
    assert raised.value.attempts[-1].outcome == "interrupted"
    assert core.seen == [] and stream.report is None


async def test_async_interrupted_stream() -> None:
    broken = Behaviour(stop_after=2, ending="error", error=EngineFailedError("the engine died"))
    with TierServer(broken) as edge:
        async with async_client(edge_url=edge.url) as client:
            stream = await client.chat.completions.create(**ASK, stream=True)
            with pytest.raises(AnswerInterruptedError, match="engine died") as raised:
                async for _ in stream:
                    pass
    assert raised.value.tokens_delivered == 2


def test_a_gap_in_the_tokens_is_an_error_not_an_answer() -> None:
    with TierServer(Behaviour(stop_after=2, ending="gap")) as edge, sync_client(edge_url=edge.url) as client:
        stream = client.chat.completions.create(**ASK, stream=True)
        with pytest.raises(AnswerInterruptedError, match="token 3 came where 2 was next"):
            list(stream)


# -- time --------------------------------------------------------------------------------------


def test_deadline_is_kept_whatever_the_tiers_do() -> None:
    with (
        TierServer(Behaviour(silent=True)) as edge,
        TierServer(Behaviour(silent=True)) as core,
        sync_client(edge_url=edge.url, core_url=core.url) as client,
    ):
        begin_s = time.monotonic()
        with pytest.raises(DeadlineExceededError) as raised:
            client.chat.completions.create(**ASK, deadline_ms=1500, max_tokens=20)
        took_s = time.monotonic() - begin_s
    assert 1.4 < took_s < 8
    assert {attempt.tier for attempt in raised.value.attempts} == {"edge", "core"}


async def test_async_deadline_in_the_middle_of_a_stream() -> None:
    with TierServer(Behaviour(stop_after=2, ending="stall")) as edge:
        async with async_client(edge_url=edge.url) as client:
            stream = await client.chat.completions.create(**ASK, stream=True, deadline_ms=1500)
            begin_s = time.monotonic()
            with pytest.raises(DeadlineExceededError) as raised:
                async for _ in stream:
                    pass
    assert time.monotonic() - begin_s < 8
    assert raised.value.tokens_delivered == 2 and raised.value.partial_text == "".join(WORDS[:2])


async def test_async_device_is_held_to_its_time(own_student: Student) -> None:
    assert own_student.process_id is not None
    async with async_client(device=own_student) as client:
        await client.chat.completions.create(**SHORT)
        os.kill(own_student.process_id, signal.SIGSTOP)
        begin_s = time.monotonic()
        with pytest.raises(DeadlineExceededError):
            await client.chat.completions.create(**SHORT, deadline_ms=300)
        assert time.monotonic() - begin_s < 8
        os.kill(own_student.process_id, signal.SIGCONT)


async def test_cancelling_an_async_call_closes_it_at_the_tier() -> None:
    with TierServer(Behaviour(silent=True)) as edge:
        async with async_client(edge_url=edge.url) as client:
            task = asyncio.ensure_future(client.chat.completions.create(**ASK))
            async with asyncio.timeout(20):
                while not edge.seen:
                    await asyncio.sleep(0.005)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(edge.seen[0].left_early.wait, 5)
            assert client.measurements()[0].num_in_flight == 0


def test_closing_a_stream_early_closes_it_at_the_tier() -> None:
    with (
        TierServer(Behaviour(words=("a",) * 500, token_delay_s=0.02)) as edge,
        sync_client(edge_url=edge.url) as client,
    ):
        with client.chat.completions.create(**ASK, stream=True) as stream:
            next(stream)
        assert edge.seen[0].left_early.wait(5)
        assert client.measurements()[0].num_in_flight == 0
        assert list(stream) == []


# -- device and privacy ------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["auto", "prefer-core", "prefer-device"])
def test_private_requests_stay_on_the_device(mode: Any, student: Student) -> None:
    with TierServer() as edge, sync_client(edge_url=edge.url, device=student) as client:
        answer = client.chat.completions.create(**SHORT, privacy="device-only", mode=mode)
        with pytest.raises(OutOfRangeError):  # refused by the device, and still asked nowhere else
            client.chat.completions.create(
                **SHORT, privacy="device-only", mode=mode, logit_bias={"100000": 1.0}
            )
    assert edge.seen == []
    assert answer.longshore is not None and {hop.tier for hop in answer.longshore.hops} == {"device"}


def test_private_request_without_a_device_is_refused() -> None:
    with (
        TierServer() as edge,
        sync_client(edge_url=edge.url) as client,
        pytest.raises(NoTierAvailableError, match="device"),
    ):
        client.chat.completions.create(**ASK, privacy="device-only")
    assert edge.seen == []


def test_device_that_can_not_start_says_why_where_it_is_the_only_one(
    bundle_dir: Path, tmp_path: Path
) -> None:
    damaged = shutil.copytree(bundle_dir, tmp_path / "damaged")
    model = next(damaged.glob("**/*.onnx"))
    model.write_bytes(model.read_bytes()[:-1] + b"?")
    with TierServer() as edge, sync_client(edge_url=edge.url, device=damaged) as client:
        for _ in range(2):
            with pytest.raises(BundleDamagedError):
                client.chat.completions.create(**ASK, mode="device-only")
        answer = client.chat.completions.create(**ASK, mode="prefer-device")
    assert outcomes(answer.longshore)[:2] == [("device", "skipped"), ("edge", "served")]


def test_prompt_too_long_for_the_only_tier_says_so(student: Student) -> None:
    long: Any = {"model": "shop", "messages": [{"role": "user", "content": "word " * 3000}]}
    with sync_client(device=student) as client:
        loaded(client)
        with pytest.raises(PromptTooLongError):
            client.chat.completions.create(**long)
    with TierServer() as core, sync_client(core_url=core.url, device=student) as client:
        answer = client.chat.completions.create(**long, mode="prefer-device")
    assert outcomes(answer.longshore)[:2] == [("device", "skipped"), ("core", "served")]


def test_device_starts_when_first_used_if_asked_to(bundle_dir: Path) -> None:
    with sync_client(device=bundle_dir, device_settings=DEVICE, device_start="first-use") as client:
        assert client.measurements()[0].prefill_tokens_per_s is None
        answer = client.chat.completions.create(**SHORT)
        assert client.measurements()[0].prefill_tokens_per_s is not None
        assert len(client.models.list().data) == 1
    assert answer.usage is not None and answer.usage.completion_tokens == 8


def test_device_whose_process_dies_mid_answer_is_told_as_interrupted(own_student: Student) -> None:
    with sync_client(device=own_student) as client:
        loaded(client)
        stream = client.chat.completions.create(**{**SHORT, "max_tokens": 150}, stream=True)
        next(stream)
        assert own_student.process_id is not None
        os.kill(own_student.process_id, signal.SIGKILL)
        with pytest.raises(AnswerInterruptedError) as raised:
            list(stream)
        assert raised.value.partial_text == stream.text and raised.value.tokens_delivered
        assert client.chat.completions.create(**SHORT).usage is not None  # and the next one is answered


def test_models_need_a_tier_that_answers(student: Student) -> None:
    with sync_client(core_url=NOBODY) as client, pytest.raises(ConnectionFailedError):
        client.models.list()
    with TierServer() as edge, sync_client(edge_url=[NOBODY, edge.url], device=student) as client:
        assert [card.id for card in client.models.list().data] == ["shop", student.manifest.name]


# -- the socket --------------------------------------------------------------------------------


async def test_stream_socket_carries_several_chats() -> None:
    async with (
        SocketServer(lambda request: (request.messages[-1].text, "!")) as server,
        async_client(edge_url=server.url) as client,
        client.stream_socket() as socket,
    ):
        streams = [
            await socket.chat(model="shop", messages=[{"role": "user", "content": f"n{number}"}])
            for number in range(5)
        ]
        for number, stream in enumerate(streams):
            text = "".join([c.choices[0].delta.content or "" async for c in stream])
            assert text == stream.text == f"n{number}!"
            assert stream.report is not None
        assert await socket.ping() > 0


async def test_socket_that_ends_an_answer_too_early_is_not_believed() -> None:
    async with (
        SocketServer(lambda request: ("a", "b")) as server,
        async_client(edge_url=server.url) as client,
        client.stream_socket() as socket,
    ):
        stream = await socket.chat(**ASK, n=2)  # the server answers one choice and says that it is done
        with pytest.raises(AnswerInterruptedError) as raised:
            async for _ in stream:
                pass
    assert (raised.value.tokens_delivered, raised.value.partial_text) == (2, "ab")


# -- the call alone, with a clock of its own ---------------------------------------------------


def make_call(deadline_s: float = 10.0, tiers: tuple[str, ...] = ("edge", "core"), **changes: Any) -> Call:
    request = decode_chat_request({**ASK, "longshore": {"request_id": "ab" * 16}})
    meters = {tier: TierMeter(tier, tier, RoutingSettings()) for tier in tiers}  # type: ignore[arg-type]
    settings = CallSettings("auto", 0.0, deadline_s, 300.0, False, RoutingSettings())
    return Call(
        request,
        dataclasses.replace(settings, **changes),
        meters=meters,
        views=lambda now_s: [meter.view(now_s) for meter in meters.values()],
        num_prompt_tokens=10,
        budget=RetryBudget(RoutingSettings()),
        random_unit=lambda: 0.5,
    )


def test_deadline_shrinks_on_the_way_and_each_tier_is_told_what_remains() -> None:
    call = make_call(deadline_s=10.0)
    first = call.next_step(1.0)
    assert isinstance(first, Try) and first.candidate.tier == "edge"
    assert first.request.longshore.deadline_ms == 9000
    assert first.first_token_by_s < first.deadline_s == 10.0
    call.fail(UnavailableError("down"), 4.0)
    second = call.next_step(4.0)
    assert isinstance(second, Try) and second.candidate.tier == "core"
    assert second.request.longshore.deadline_ms == 6000
    assert second.first_token_by_s == 10.0  # nobody is left to save time for


def test_rounds_are_bounded_and_waits_stay_within_the_deadline() -> None:
    call = make_call(deadline_s=100.0, tiers=("core",))
    now_s, waits = 0.0, []
    with pytest.raises(QueueFullError):
        for _ in range(50):
            step = call.next_step(now_s)
            if isinstance(step, Wait):
                waits.append(step.seconds)
                now_s += step.seconds
            else:
                call.fail(QueueFullError("full", retry_after_s=1.0), now_s)
    assert len(waits) == RoutingSettings().max_rounds - 1
    assert all(wait_s >= 1.0 for wait_s in waits)


def test_no_wait_that_the_deadline_would_cut() -> None:
    call = make_call(deadline_s=1.0, tiers=("core",))
    assert isinstance(call.next_step(0.0), Try)
    call.fail(QueueFullError("full", retry_after_s=30.0), 0.1)
    with pytest.raises(QueueFullError):
        call.next_step(0.1)


def test_time_that_ran_out_is_told_as_such() -> None:
    call = make_call(deadline_s=1.0)
    with pytest.raises(DeadlineExceededError, match="no answer within 1000 ms"):
        call.next_step(1.0)


def test_progress_knows_where_another_tier_goes_on() -> None:
    progress = Progress(1)
    for offset, word in enumerate(("The", " lamp")):
        progress.add(TokenEvent(TokenMark(0, offset, 7 + offset, 0, DIGEST), word))
    continuation = progress.continuation()
    assert (continuation.token_ids, continuation.text) == ((7, 8), "The lamp")
    assert (continuation.segment, continuation.model_digest) == (1, DIGEST)
    assert progress.resume_offset == 2
    for repeated in (0, 1, 3):
        with pytest.raises(ProtocolError):
            Progress(1).add(TokenEvent(TokenMark(0, repeated or 5, 1, 0, DIGEST), "x"))
    with pytest.raises(ProtocolError):
        progress.add(FinishEvent("stop", index=1))


# -- the package -------------------------------------------------------------------------------


def test_public_names_are_what_they_are_said_to_be() -> None:
    assert {"Client", "AsyncClient", "ChatCompletion", "Report", "AnswerInterruptedError"} <= set(
        longshore.__all__
    )
    assert longshore.__all__ == sorted(longshore.__all__)
    errors = {
        name
        for name, value in inspect.getmembers(longshore.errors, inspect.isclass)
        if issubclass(value, LongshoreError) and not issubclass(value, longshore.errors.ExportError)
    }
    assert errors <= set(longshore.__all__)  # all but those of the export command
    for name in longshore.__all__:
        assert getattr(longshore, name) is not None
    assert set(longshore.__all__) <= set(dir(longshore))
    with pytest.raises(AttributeError):
        longshore.Nonsense  # noqa: B018
