"""A tier made of sockets for the SDK's tests: speaks the wire, and on request stalls, cuts, lies or refuses.

Runs on a thread of its own with its own event loop; records what it was asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import Any, Self

from websockets.asyncio.server import ServerConnection, serve

from longshore.errors import CancelledError, LongshoreError
from longshore.sse import DONE, KEEPALIVE, encode_data, encode_error, encode_message, read_client_message
from longshore.wire import (
    AnswerEvent,
    Attempt,
    CancelMessage,
    ChatRequest,
    CreditMessage,
    ErrorMessage,
    FinishEvent,
    FinishMessage,
    GenerateMessage,
    Hop,
    PingMessage,
    PongMessage,
    Report,
    Tier,
    TokenEvent,
    TokenMark,
    TokenMessage,
    decode_any_request,
    usage_of,
)
from longshore.wire.render import ChatRenderer, CompletionRenderer

DIGEST = "ab" * 16
WORDS = ("The", " lamp", " costs", " thirty", "-one", " dollars", ".")


@dataclass(frozen=True)
class Behaviour:
    """How a request is answered. Delays in seconds; `stop_after` tokens the stream ends as `ending` says."""

    words: tuple[str, ...] = WORDS
    first_delay_s: float = 0.0
    token_delay_s: float = 0.0
    status: int = 200
    error: LongshoreError | None = None
    retry_after: str | None = None
    stop_after: int | None = None
    ending: str = "cut"  # cut, clean, done, error, gap, stall, garbage, huge
    served_by: Tier = "core"
    cached: bool = False
    content_type: str = "text/event-stream"
    has_report: bool = True
    keepalives_s: float | None = None
    silent: bool = False  # takes the request and sends nothing at all
    raw: bytes | None = None


@dataclass
class Seen:
    """One request as it arrived, and whether the client left before the end."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    left_early: threading.Event = field(default_factory=threading.Event)
    answered: threading.Event = field(default_factory=threading.Event)


class TierServer:
    """`with TierServer(Behaviour(...)) as tier:` listens at `tier.url`."""

    def __init__(self, behaviour: Behaviour | None = None, tls: ssl.SSLContext | None = None) -> None:
        self.behaviour = behaviour or Behaviour()
        self._tls = tls
        self.script: list[Behaviour] = []  # used up first, one a request
        self.seen: list[Seen] = []
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._stop: asyncio.Event | None = None
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._run()))

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(5)
        return self

    def __exit__(self, *exc_info: object) -> None:
        assert self._stop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(timeout=5)
        assert not self._thread.is_alive()
        self._loop.close()

    async def _run(self) -> None:
        self._stop = asyncio.Event()
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0, ssl=self._tls)
        port = server.sockets[0].getsockname()[1]
        self.url = f"{'https' if self._tls else 'http'}://127.0.0.1:{port}"
        self._ready.set()
        await self._stop.wait()
        server.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._request(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                await writer.wait_closed()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; False closes the connection."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        _, path, _ = head[0].split(" ")
        headers = {
            name.strip().lower(): value.strip()
            for name, value in (line.split(":", 1) for line in head[1:] if ":" in line)
        }
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        seen = Seen(path, headers, json.loads(body) if body else {})
        self.seen.append(seen)
        if path == "/v1/models":
            await self._plain(writer, 200, {"object": "list", "data": [{"id": "shop", "object": "model"}]})
            return True
        behaviour = self.script.pop(0) if self.script else self.behaviour
        watch = asyncio.ensure_future(self._watch(reader, seen))
        try:
            return await self._answer(writer, seen, behaviour)
        finally:
            watch.cancel()

    @staticmethod
    async def _watch(reader: asyncio.StreamReader, seen: Seen) -> None:
        while not reader.at_eof():
            await asyncio.sleep(0.005)
        if not seen.answered.is_set():
            seen.left_early.set()

    async def _answer(self, writer: asyncio.StreamWriter, seen: Seen, behaviour: Behaviour) -> bool:
        if behaviour.silent:
            await self._until(seen.left_early)
            return False
        if behaviour.raw is not None:
            writer.write(behaviour.raw)
            await writer.drain()
            return False
        if behaviour.error is not None and behaviour.stop_after is None:
            extra = {"retry-after": behaviour.retry_after} if behaviour.retry_after else {}
            status = behaviour.error.status
            await self._plain(writer, status, behaviour.error.to_body(), extra)
            return True
        writer.write(
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ncontent-type: "
            + behaviour.content_type.encode()
            + b"\r\n\r\n"
        )
        async for data in self._pieces(seen, behaviour):
            writer.write(b"%x\r\n%s\r\n" % (len(data), data))
            await writer.drain()
        if behaviour.stop_after is not None and behaviour.ending == "cut":
            return False
        if behaviour.stop_after is not None and behaviour.ending == "stall":
            await self._until(seen.left_early)
            return False
        seen.answered.set()
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True

    async def _pieces(self, seen: Seen, behaviour: Behaviour) -> AsyncIterator[bytes]:
        request = decode_any_request(seen.body)
        is_chat = isinstance(request, ChatRequest)
        renderer = (ChatRenderer if is_chat else CompletionRenderer)(
            request_id=request.longshore.request_id or "0" * 32, model=request.model, created=1
        )
        waited_s = 0.0
        while behaviour.keepalives_s is not None and waited_s < behaviour.first_delay_s:
            await asyncio.sleep(behaviour.keepalives_s)
            waited_s += behaviour.keepalives_s
            yield KEEPALIVE
        if behaviour.keepalives_s is None:
            await asyncio.sleep(behaviour.first_delay_s)
        for number, event in enumerate(events(request.longshore.request_id or "0" * 32, behaviour)):
            if behaviour.stop_after is not None and number == behaviour.stop_after:
                if (last := _ending(behaviour, renderer, event)) is not None:
                    yield last
                return
            if number:
                await asyncio.sleep(behaviour.token_delay_s)
            for chunk in renderer.chunks(event):
                yield encode_data(chunk)
        yield DONE

    @staticmethod
    async def _until(event: threading.Event) -> None:
        while not event.is_set():
            await asyncio.sleep(0.005)

    @staticmethod
    async def _plain(
        writer: asyncio.StreamWriter, status: int, body: Any, extra: dict[str, str] | None = None
    ) -> None:
        data = json.dumps(body).encode()
        lines = [f"{name}: {value}" for name, value in (extra or {}).items()]
        head = [f"HTTP/1.1 {status} X", "content-type: application/json", f"content-length: {len(data)}"]
        writer.write("\r\n".join([*head, *lines, "", ""]).encode() + data)
        await writer.drain()


def _ending(behaviour: Behaviour, renderer: Any, event: AnswerEvent) -> bytes | None:
    if behaviour.ending == "done":
        return DONE
    if behaviour.ending == "error":
        assert behaviour.error is not None
        return encode_error(behaviour.error)
    if behaviour.ending == "gap" and isinstance(event, TokenEvent):
        late = replace(event, mark=replace(event.mark, offset=event.mark.offset + 1))
        return encode_data(renderer.chunks(late)[0])
    if behaviour.ending == "garbage":
        return b"data: {not json\n\n"
    if behaviour.ending == "huge":
        return b"data: " + b"x" * (2 * 1024 * 1024)
    return None


def events(request_id: str, behaviour: Behaviour) -> list[AnswerEvent]:
    """A whole answer: one token a word, then the end with usage and report."""
    out: list[AnswerEvent] = []
    num_bytes = 0
    for offset, word in enumerate(behaviour.words):
        out.append(TokenEvent(TokenMark(0, offset, offset + 100, num_bytes, DIGEST), word))
        num_bytes += len(word.encode())
    report = Report(
        request_id,
        behaviour.served_by,
        f"{behaviour.served_by}-1",
        DIGEST,
        reason="because",
        cached=behaviour.cached,
        attempts=(Attempt(behaviour.served_by, "served", "inner", f"{behaviour.served_by}-1", 1.0),),
        hops=(Hop(behaviour.served_by, f"{behaviour.served_by}-1", total_ms=1.0),),
    )
    end = FinishEvent("stop", usage=usage_of(5, len(behaviour.words)))
    out.append(replace(end, report=report) if behaviour.has_report else end)
    return out


# -- WebSocket ---------------------------------------------------------------------------------


class SocketServer:
    """`async with SocketServer() as tier:` answers `/v1/stream`, minding credit and cancels.

    The words of an answer come from `words_of(request)`; `overrun` ignores the credit.
    """

    def __init__(self, words_of: Callable[[ChatRequest], tuple[str, ...]], *, overrun: bool = False) -> None:
        self.url = ""
        self.cancelled: list[str] = []
        self.num_pings = 0
        self.largest_unread = 0
        self._words_of = words_of
        self._overrun = overrun
        self._credit: dict[str, int] = {}
        self._more: dict[str, asyncio.Event] = {}

    async def __aenter__(self) -> Self:
        self._server = await serve(self._socket, "127.0.0.1", 0, compression=None)
        port = next(iter(self._server.sockets)).getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._server.close()
        await asyncio.wait_for(self._server.wait_closed(), 5)

    async def _socket(self, connection: ServerConnection) -> None:
        if connection.request is None or connection.request.headers.get("authorization") != "Bearer key":
            await connection.close(4401, "bad key")
            return
        tasks: dict[str, asyncio.Task[None]] = {}
        try:
            async for frame in connection:
                message = read_client_message(frame)
                if isinstance(message, PingMessage):
                    self.num_pings += 1
                    await connection.send(encode_message(PongMessage(message.nonce)))
                elif isinstance(message, CreditMessage):
                    self._credit[message.id] = self._credit.get(message.id, 0) + message.tokens
                    self._more[message.id].set()
                elif isinstance(message, CancelMessage):
                    self.cancelled.append(message.id)
                    tasks[message.id].cancel()
                    await self._refuse(connection, message.id, CancelledError("cancelled"))
                elif isinstance(message, GenerateMessage):
                    self._credit[message.id] = message.credit or 10**6
                    self._more[message.id] = asyncio.Event()
                    tasks[message.id] = asyncio.create_task(self._generate(connection, message))
        finally:
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)

    async def _generate(self, connection: ServerConnection, message: GenerateMessage) -> None:
        assert isinstance(message.request, ChatRequest)
        words = self._words_of(message.request)
        if words == ("break",):
            await connection.close(1011, "broken")
            return
        if words == ("silence",):
            await asyncio.Event().wait()
        for event in events("0" * 32, Behaviour(words=words)):
            if isinstance(event, TokenEvent):
                await self._take_credit(message.id)
                token = TokenMessage(message.id, event.mark, event.text)
                await connection.send(encode_message(token))
            else:
                end = FinishMessage(message.id, event.finish_reason, usage=event.usage, report=event.report)
                await connection.send(encode_message(end))

    async def _take_credit(self, generation_id: str) -> None:
        while self._credit[generation_id] == 0 and not self._overrun:
            self._more[generation_id].clear()
            await self._more[generation_id].wait()
        self._credit[generation_id] -= 1

    @staticmethod
    async def _refuse(connection: ServerConnection, generation_id: str, error: LongshoreError) -> None:
        await connection.send(encode_message(ErrorMessage(error.to_body()["error"], generation_id)))
