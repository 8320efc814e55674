"""HTTP and WebSocket transports against servers that answer, stall, cut, lie and refuse."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from certificates import write_certificate
from longshore.config import HttpSettings
from longshore.errors import (
    AnswerInterruptedError,
    AuthenticationError,
    CancelledError,
    ConnectionFailedError,
    DeadlineExceededError,
    EngineFailedError,
    InternalError,
    InvalidRequestError,
    LongshoreError,
    ProtocolError,
    QueueFullError,
    UnavailableError,
    UpstreamError,
)
from longshore.multiplex import Multiplexer
from longshore.sse import encode_message, read_client_message
from longshore.transport import AsyncHttpTransport, HttpTransport, SocketTransport, Timing, open_socket
from longshore.watchdog import Watchdog
from longshore.wire import (
    AnswerEvent,
    ChatRequest,
    CreditMessage,
    FinishEvent,
    TokenEvent,
    TokenMark,
    TokenMessage,
    decode_chat_request,
)
from sdk_python.tier_server import DIGEST, WORDS, Behaviour, SocketServer, TierServer

SETTINGS = HttpSettings(trust_env=False)
REQUEST = decode_chat_request(
    {
        "model": "shop",
        "messages": [{"role": "user", "content": "What does the lamp cost?"}],
        "stream": True,
        "longshore": {"request_id": "ab" * 16},
    }
)
MUCH_LATER_S = 8.0  # a busy machine is no failure; a wait without an end is
NOBODY = "http://127.0.0.1:9"

Outcome = tuple[list[AnswerEvent], LongshoreError | None, float]


def timing(first_s: float = 20.0, whole_s: float = 40.0) -> Timing:
    return Timing(time.monotonic() + first_s, time.monotonic() + whole_s)


def blocking(
    url: str, first_s: float = 20.0, whole_s: float = 40.0, settings: HttpSettings = SETTINGS
) -> Outcome:
    transport = HttpTransport(settings, "key")
    transport.prepare()
    got: list[AnswerEvent] = []
    begin_s, error = time.monotonic(), None
    try:
        for event in transport.stream(url, REQUEST, 1, timing(first_s, whole_s)):
            got.append(event)
    except LongshoreError as failure:
        error = failure
    finally:
        transport.close()
    return got, error, time.monotonic() - begin_s


def in_asyncio(
    url: str, first_s: float = 20.0, whole_s: float = 40.0, settings: HttpSettings = SETTINGS
) -> Outcome:
    async def run() -> Outcome:
        transport = AsyncHttpTransport(settings, "key")
        transport.prepare()
        got: list[AnswerEvent] = []
        begin_s, error = time.monotonic(), None
        try:
            async with contextlib.aclosing(
                transport.stream(url, REQUEST, 1, timing(first_s, whole_s))
            ) as events:
                async for event in events:
                    got.append(event)
        except LongshoreError as failure:
            error = failure
        finally:
            await transport.close()
        return got, error, time.monotonic() - begin_s

    return asyncio.run(run())


both = pytest.mark.parametrize("ask", [blocking, in_asyncio])
Ask = Callable[..., Outcome]


def text(events: list[AnswerEvent]) -> str:
    return "".join(event.text for event in events)


# -- answers -----------------------------------------------------------------------------------


@both
def test_whole_answer_comes_with_marks_usage_and_report(ask: Ask) -> None:
    with TierServer() as tier:
        events, error, _ = ask(tier.url)
    assert error is None
    assert text(events) == "".join(WORDS)
    assert [event.mark.offset for event in events if isinstance(event, TokenEvent)] == list(range(len(WORDS)))
    end = events[-1]
    assert isinstance(end, FinishEvent) and end.finish_reason == "stop"
    assert end.report is not None and end.report.node == "core-1"
    assert end.usage is not None and end.usage.completion_tokens == len(WORDS)
    seen = tier.seen[0]
    assert seen.headers["authorization"] == "Bearer key"
    assert seen.headers["x-request-id"] == "ab" * 16
    assert seen.body["stream"] is True


@both
def test_multibyte_text_survives_any_chunking(ask: Ask) -> None:
    with TierServer(Behaviour(words=("Grüße ", "東京", " 🚢"))) as tier:
        events, error, _ = ask(tier.url)
    assert error is None
    assert text(events) == "Grüße 東京 🚢"


# -- refusals ----------------------------------------------------------------------------------


@both
def test_refusals_come_back_as_the_errors_that_were_raised(ask: Ask) -> None:
    with TierServer() as tier:
        for sent in (
            InvalidRequestError("bad temperature", param="temperature"),
            AuthenticationError("who are you"),
            InternalError("oops"),
            UnavailableError("starting"),
        ):
            tier.script.append(Behaviour(error=sent))
            events, error, _ = ask(tier.url)
            assert events == []
            assert type(error) is type(sent)
            assert error.message == sent.message and error.param == sent.param


@both
def test_retry_after_header_is_minded(ask: Ask) -> None:
    with TierServer(Behaviour(error=QueueFullError("full"), retry_after="7")) as tier:
        _, error, _ = ask(tier.url)
    assert isinstance(error, QueueFullError) and error.retry_after_s == 7


@both
@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (b"HTTP/1.1 502 X\r\ncontent-length: 5\r\n\r\n<htm>", UpstreamError),
        (b"HTTP/1.1 302 X\r\nlocation: http://127.0.0.1:9/\r\ncontent-length: 0\r\n\r\n", UpstreamError),
        (b"HTTP/1.1 418 X\r\ncontent-length: 0\r\n\r\n", LongshoreError),
        (b"no http at all\r\n\r\n", UpstreamError),
        (b"HTTP/1.1 200 X\r\ncontent-type: text/html\r\ncontent-length: 0\r\n\r\n", ProtocolError),
        (b"", UpstreamError),
    ],
)
def test_answers_that_are_none_end_in_typed_errors(
    ask: Ask, answer: bytes, kind: type[LongshoreError]
) -> None:
    with TierServer(Behaviour(raw=answer)) as tier:
        events, error, _ = ask(tier.url)
    assert events == []
    assert isinstance(error, kind)


@both
def test_endless_error_body_is_cut(ask: Ask) -> None:
    endless = b"HTTP/1.1 500 X\r\ncontent-length: 9999999\r\n\r\n" + b"x" * 200_000
    with TierServer(Behaviour(raw=endless)) as tier:
        _, error, _ = ask(tier.url)
    assert isinstance(error, UpstreamError)


@both
def test_nobody_listens(ask: Ask) -> None:
    _, error, took_s = ask(NOBODY)
    assert isinstance(error, ConnectionFailedError)
    assert took_s < MUCH_LATER_S


# -- broken streams ----------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    ("ending", "kind"),
    [
        ("cut", UpstreamError),
        ("clean", AnswerInterruptedError),
        ("done", AnswerInterruptedError),
        ("garbage", ProtocolError),
        ("huge", ProtocolError),
    ],
)
def test_cut_streams_give_what_came_and_then_an_error(
    ask: Ask, ending: str, kind: type[LongshoreError]
) -> None:
    with TierServer(Behaviour(stop_after=3, ending=ending)) as tier:
        events, error, _ = ask(tier.url)
    assert text(events) == "".join(WORDS[:3])
    assert type(error) is kind


@both
def test_error_event_is_raised_after_the_tokens_before_it(ask: Ask) -> None:
    broken = Behaviour(stop_after=2, ending="error", error=EngineFailedError("the engine died"))
    with TierServer(broken) as tier:
        events, error, _ = ask(tier.url)
    assert text(events) == "".join(WORDS[:2])
    assert isinstance(error, EngineFailedError)


# -- time --------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    "behaviour",
    [
        Behaviour(silent=True),
        Behaviour(first_delay_s=30),
        Behaviour(first_delay_s=30, keepalives_s=0.02),
        Behaviour(stop_after=0, ending="stall"),
    ],
    ids=["no head", "no token", "keepalives only", "head only"],
)
def test_first_token_has_its_own_deadline(ask: Ask, behaviour: Behaviour) -> None:
    with TierServer(behaviour) as tier:
        events, error, took_s = ask(tier.url, 0.6, 20)
        assert tier.seen[0].left_early.wait(5)
    assert events == []
    assert isinstance(error, DeadlineExceededError)
    assert 0.5 < took_s < MUCH_LATER_S


@both
def test_stall_after_a_token_ends_at_the_deadline(ask: Ask) -> None:
    with TierServer(Behaviour(stop_after=2, ending="stall")) as tier:
        events, error, took_s = ask(tier.url, 1.0, 1.5)
        assert tier.seen[0].left_early.wait(5)
    assert len(events) == 2
    assert isinstance(error, DeadlineExceededError)
    assert 1.4 < took_s < MUCH_LATER_S


@both
def test_trickling_tokens_end_at_the_deadline(ask: Ask) -> None:
    with TierServer(Behaviour(words=("a",) * 500, token_delay_s=0.03)) as tier:
        events, error, took_s = ask(tier.url, 1.0, 1.5)
    assert events
    assert isinstance(error, DeadlineExceededError)
    assert took_s < MUCH_LATER_S


def test_leaving_a_stream_closes_it_at_the_server() -> None:
    transport = HttpTransport(SETTINGS, None)
    with TierServer(Behaviour(words=("a",) * 500, token_delay_s=0.02)) as tier:
        events = transport.stream(tier.url, REQUEST, 1, timing())
        next(events)
        events.close()
        assert tier.seen[0].left_early.wait(5)
    transport.close()


async def test_cancelling_a_task_closes_the_stream_at_the_server() -> None:
    transport = AsyncHttpTransport(SETTINGS, None)
    with TierServer(Behaviour(silent=True)) as tier:
        events = transport.stream(tier.url, REQUEST, 1, timing())
        task = asyncio.ensure_future(anext(events))
        async with asyncio.timeout(20):
            while not tier.seen:
                await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(tier.seen[0].left_early.wait, 5)
    await transport.close()


def test_closed_transport_says_so() -> None:
    transport = HttpTransport(SETTINGS, None)
    transport.close()
    with pytest.raises(UnavailableError, match="closed"):
        next(transport.stream(NOBODY, REQUEST, 1, timing()))


def test_connections_are_kept_and_shared_between_threads() -> None:
    transport = HttpTransport(SETTINGS, None)
    texts: list[str] = []

    def ask() -> None:
        for _ in range(5):
            texts.append(text(list(transport.stream(tier.url, REQUEST, 1, timing()))))

    with TierServer() as tier:
        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        transport.close()
    assert texts == ["".join(WORDS)] * 20


def test_watchdog_fires_once_it_is_time_and_not_after_release() -> None:
    watchdog = Watchdog(time.monotonic)
    pairs = [socket.socketpair() for _ in range(3)]
    watches = [watchdog.watch(here, time.monotonic() + 0.3) for here, _ in pairs]
    watchdog.release(watches[1])
    watchdog.move(watches[2], time.monotonic() + 30)
    assert pairs[0][0].recv(1) == b""  # blocks until the watchdog shuts it down
    time.sleep(0.05)
    assert [watch.fired for watch in watches] == [True, False, False]
    watchdog.close()
    for here, there in pairs:
        here.close()
        there.close()


# -- TLS ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_certificate(tmp_path_factory.mktemp("tls") / "both.pem")


@both
def test_deadlines_hold_under_tls_too(ask: Ask, certificate: Path) -> None:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate)
    trusting = replace(SETTINGS, verify=ssl.create_default_context(cafile=certificate))
    with TierServer(Behaviour(), tls=server) as tier:
        assert ask(tier.url, settings=trusting)[1] is None
        tier.behaviour = Behaviour(stop_after=2, ending="stall")
        events, error, took_s = ask(tier.url, 1.0, 1.5, trusting)
        assert isinstance(error, DeadlineExceededError)
        assert len(events) == 2 and 1.4 < took_s < MUCH_LATER_S
        _, error, _ = ask(tier.url)
        assert isinstance(error, ConnectionFailedError)  # a certificate that nobody vouches for


# -- WebSocket ---------------------------------------------------------------------------------


def words_of(request: ChatRequest) -> tuple[str, ...]:
    content = request.messages[-1].text
    if content in ("break", "silence"):
        return (content,)
    return tuple(f"{content}{number} " for number in range(300 if content.startswith("long") else 5))


def question(content: str) -> ChatRequest:
    return decode_chat_request({"model": "shop", "messages": [{"role": "user", "content": content}]})


@contextlib.asynccontextmanager
async def connected(server: SocketServer) -> AsyncGenerator[SocketTransport, None]:
    transport = await open_socket(server.url, "key", SETTINGS, 5.0)
    try:
        yield transport
    finally:
        await asyncio.wait_for(transport.close(), 5)


async def collect(transport: SocketTransport, content: str) -> str:
    parts = []
    async with contextlib.aclosing(transport.stream(question(content), 1, timing())) as events:
        async for event in events:
            parts.append(event.text)
    return "".join(parts)


async def test_many_generations_share_a_socket() -> None:
    contents = [f"q{number}-" for number in range(20)] + ["long-a-", "long-b-"]
    async with SocketServer(words_of) as server, connected(server) as transport:
        answers = await asyncio.gather(*(collect(transport, content) for content in contents))
        rtt_s = await transport.ping(2.0)
    assert answers == ["".join(words_of(question(content))) for content in contents]
    assert 0 < rtt_s < 2 and server.num_pings == 1


async def test_slow_reader_holds_up_only_itself() -> None:
    async with SocketServer(words_of) as server, connected(server) as transport:
        slow = transport.stream(question("long-slow-"), 1, timing())
        await anext(slow)
        for _ in range(5):
            assert await collect(transport, "long-fast-")
        assert transport.num_unread <= 64  # what it was granted, however long it is not read
        rest = [event.text async for event in slow]
    assert len(rest) == 300


async def test_leaving_cancels_one_generation_and_the_socket_goes_on() -> None:
    async with SocketServer(words_of) as server, connected(server) as transport:
        events = transport.stream(question("long-x-"), 1, timing())
        await anext(events)
        await events.aclose()
        assert await collect(transport, "after-")
        assert len(server.cancelled) == 1


async def test_broken_socket_ends_every_generation_in_an_error() -> None:
    async with SocketServer(words_of) as server, connected(server) as transport:
        slow = transport.stream(question("long-x-"), 1, timing())
        await anext(slow)
        with pytest.raises(UpstreamError):
            await collect(transport, "break")
        with pytest.raises(UpstreamError):
            async for _ in slow:
                pass
        with pytest.raises(UpstreamError):
            await collect(transport, "afterwards")


async def test_server_that_ignores_credit_is_cut_off() -> None:
    async with SocketServer(words_of, overrun=True) as server, connected(server) as transport:
        events = transport.stream(question("long-x-"), 1, timing())
        await anext(events)
        async with asyncio.timeout(20):
            while transport.num_unread < 64:  # all it was granted but the one read, and then the error
                await asyncio.sleep(0.005)
        with pytest.raises(ProtocolError, match="granted"):
            async for _ in events:
                pass


async def test_silent_generation_ends_at_its_deadline_and_the_socket_goes_on() -> None:
    async with SocketServer(words_of) as server, connected(server) as transport:
        events = transport.stream(question("silence"), 1, timing(0.2, 5))
        with pytest.raises(DeadlineExceededError):
            await anext(events)
        assert await collect(transport, "after-")
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        with pytest.raises(ConnectionFailedError):
            await open_socket(url, "key", SETTINGS, 0.2)


async def test_socket_refusals_are_typed() -> None:
    with pytest.raises(ConnectionFailedError):
        await open_socket(NOBODY, "key", SETTINGS, 2.0)
    with (
        TierServer(Behaviour(raw=b"HTTP/1.1 401 X\r\ncontent-length: 0\r\n\r\n")) as tier,
        pytest.raises(AuthenticationError),
    ):
        await open_socket(tier.url, "key", SETTINGS, 2.0)


# -- the multiplexer alone ---------------------------------------------------------------------


def token_frame(generation_id: str, offset: int) -> str:
    return encode_message(TokenMessage(generation_id, TokenMark(0, offset, 1, 0, DIGEST), "x"))


def frames_of(mux: Multiplexer, generation_id: str, num_tokens: int) -> Iterator[str]:
    for offset in range(num_tokens):
        for _, item in mux.receive(token_frame(generation_id, offset)).items:
            assert isinstance(item, TokenEvent)
            grant = mux.consumed(generation_id, item)
            if grant is not None:
                yield grant


def test_credit_is_granted_again_as_tokens_are_read() -> None:
    mux = Multiplexer(window=8)
    generation_id, _ = mux.start(REQUEST, 1)
    grants = [read_client_message(frame) for frame in frames_of(mux, generation_id, 20)]
    assert [grant.tokens for grant in grants if isinstance(grant, CreditMessage)] == [4] * 5


def test_messages_that_crossed_a_cancel_are_dropped() -> None:
    mux = Multiplexer()
    generation_id, _ = mux.start(REQUEST, 1)
    assert mux.cancel(generation_id) is not None
    assert mux.receive(token_frame(generation_id, 0)).items == []
    assert mux.cancel(generation_id) is None


def test_error_without_an_id_ends_all_and_unreadable_frames_are_refused() -> None:
    mux = Multiplexer()
    ids = [mux.start(REQUEST, 1)[0] for _ in range(3)]
    received = mux.receive('{"type": "error", "error": {"code": "cancelled", "message": "bye"}}')
    assert [generation_id for generation_id, _ in received.items] == ids
    assert all(isinstance(item, CancelledError) for _, item in received.items)
    for frame in ("", "{}", '{"type": "token"}', b"\xff"):
        with pytest.raises(ProtocolError):
            mux.receive(frame)


def test_socket_has_a_bound_of_generations() -> None:
    mux = Multiplexer()
    for _ in range(64):
        mux.start(REQUEST, 1)
    with pytest.raises(QueueFullError):
        mux.start(REQUEST, 1)
