"""One request over HTTP, free of I/O: what is sent, and what came back turned into events or an error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from longshore.errors import InvalidRequestError, LongshoreError, ProtocolError, UpstreamError, from_body
from longshore.sse import ServerEvent, SseDecoder
from longshore.wire import (
    AnswerEvent,
    AnyRequest,
    ChatRequest,
    ModelList,
    decode,
    dump_json,
    encode,
    limits,
    load_json_object,
)
from longshore.wire.render import ChunkReader

USER_AGENT = "longshore-python"


class Exchange:
    """One streamed answer over HTTP: what is sent, and bytes back into events."""

    def __init__(self, node: str, api_key: str | None, request: AnyRequest, num_choices: int) -> None:
        is_chat = isinstance(request, ChatRequest)
        self.node = node
        self.url = node + ("/v1/chat/completions" if is_chat else "/v1/completions")
        self.body = dump_json(_streamed(request))
        self.headers = headers_for(api_key, "text/event-stream")
        self.headers["content-type"] = "application/json"
        if request.longshore.request_id is not None:
            self.headers["x-request-id"] = request.longshore.request_id
        self.is_done = False
        self._decoder = SseDecoder()
        self._reader = ChunkReader(num_choices)

    def check_head(self, headers: Mapping[str, str]) -> None:
        """Raises ProtocolError unless the answer is an event stream."""
        content_type = headers.get("content-type", "")
        if not content_type.lower().startswith("text/event-stream"):
            raise ProtocolError(f"{self.node} answered {content_type[:60]!r} instead of an event stream")

    def feed(self, data: bytes) -> Iterator[AnswerEvent]:
        """The events that `data` completes; raises the error that the stream carries, after them."""
        for event in self._decoder.feed(data):
            if event.is_done:
                self._reader.finish()
                self.is_done = True
                return
            yield from self._events(event)

    def end(self) -> None:
        """The bytes are over; raises AnswerInterruptedError if the answer is not."""
        self._decoder.feed(b"")  # raises a fault that came after the last whole event
        self._reader.finish()

    def _events(self, event: ServerEvent) -> list[AnswerEvent]:
        try:
            value = load_json_object(event.data, max_bytes=limits.MAX_EVENT_BYTES)
        except InvalidRequestError as error:
            raise ProtocolError(f"{self.node} sent an event that can't be read: {error.message}") from None
        if event.event == "error" or ("error" in value and "choices" not in value):
            raise from_body(UpstreamError.status, value)
        return self._reader.read(value)


def _streamed(request: AnyRequest) -> dict[str, Any]:
    """The body: always a stream, since time to first token is what routing goes by."""
    body = encode(request)
    body["stream"] = True
    body.pop("stream_options", None)
    return body


def headers_for(api_key: str | None, accept: str) -> dict[str, str]:
    """The headers that every request has."""
    headers = {"user-agent": USER_AGENT, "accept": accept, "accept-encoding": "identity"}
    if api_key is not None:
        headers["authorization"] = f"Bearer {api_key}"
    return headers


def answer_error(status: int, headers: Mapping[str, str], body: bytes) -> LongshoreError:
    """The error of an answer whose status is not 200, whatever its body holds."""
    try:
        value: object = load_json_object(body)
    except LongshoreError:
        value = None
    error = from_body(status, value)
    if error.retry_after_s is None:
        error.retry_after_s = _retry_after_s(headers.get("retry-after"))
    error.request_id = error.request_id or headers.get("x-request-id")
    return error


def _retry_after_s(value: str | None) -> float | None:
    """Seconds; the header's date form is not taken, since clocks differ."""
    if value is None or not value.strip().isascii() or not value.strip().isdigit():
        return None
    return min(float(value.strip()[:9]), 3600.0)


def model_list(node: str, status: int, headers: Mapping[str, str], body: bytes) -> ModelList:
    """The models that a node answered with; raises its error."""
    if status != 200:
        raise answer_error(status, headers, body)
    try:
        return decode(ModelList, load_json_object(body), lenient=True)
    except InvalidRequestError as error:
        raise ProtocolError(f"{node} sent a model list that can't be read: {error.message}") from None
