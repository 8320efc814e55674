"""Server-sent events by the rules of WHATWG HTML 9.2, in any pieces, and the WebSocket codec."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from longshore import sse, wire
from longshore.errors import (
    BodyTooLargeError,
    InternalError,
    InvalidRequestError,
    LongshoreError,
    MalformedBodyError,
    ProtocolError,
)
from longshore.sse import ServerEvent, SseDecoder
from longshore.wire import limits
from wire_strategies import any_json, cuts, instances

pytestmark = pytest.mark.fuzz

_FRAGMENTS = [
    b"data",
    b"data:",
    b"data: x",
    b"event: e",
    b"id: 1",
    b"id: \0",
    b"retry: 5",
    b": note",
    b":",
    b"\n",
    b"\r",
]
_FRAGMENTS += [
    b"\r\n",
    b"\n\n",
    b"\xef\xbb\xbf",
    b"\xef",
    b"\xbb\xbf",
    b"\xff",
    "é".encode(),
    b" ",
    b"[DONE]",
    b"x" * 30,
]
STREAMS = st.lists(st.sampled_from(_FRAGMENTS) | st.binary(max_size=4), max_size=20).map(b"".join)


def read(pieces: list[bytes], max_event_bytes: int = 64) -> tuple[list[ServerEvent], str | None, bool]:
    """Events, the fault and whether an event was open at the end."""
    decoder = SseDecoder(max_event_bytes=max_event_bytes)
    events: list[ServerEvent] = []
    try:
        for piece in [*pieces, b""]:
            events += decoder.feed(piece)
    except ProtocolError as error:
        return events, error.message, decoder.has_partial_event
    return events, None, decoder.has_partial_event


@given(st.data(), STREAMS)
@example(st.none(), b"data: a\n\ndata: " + b"x" * 80 + b"\n\n")  # a fault after a whole event
@example(st.none(), b"a\n\xef\xbb\xbfdata: x\n\n")  # a BOM that is not at the start
@example(st.none(), b"event:" + b"x" * 80 + b"\n\n")
@example(st.none(), b"data: " + b"x" * 57 + b"\n\n")
def test_the_cuts_make_no_difference(data: Any, stream: bytes) -> None:
    whole = read([stream])
    assert read([stream[i : i + 1] for i in range(len(stream))]) == whole
    if isinstance(data, st.DataObject):
        assert read(data.draw(cuts(stream))) == whole


@given(STREAMS)
def test_against_a_plain_reading_of_the_standard(stream: bytes) -> None:
    events, fault, _ = read([stream], max_event_bytes=10_000)
    if fault is None:
        assert events == reference(stream)


def reference(stream: bytes) -> list[ServerEvent]:
    """Section 9.2.6 read line by line over the whole text."""
    text = stream.decode("utf-8-sig", "replace").replace("\r\n", "\n").replace("\r", "\n")
    events, data, name, last_id = [], "", "", ""
    for line in text.split("\n")[:-1]:
        if line == "":
            if data:
                events.append(ServerEvent(data.removesuffix("\n"), name or "message", last_id))
            data, name = "", ""
        field, _, value = line.partition(":")
        value = value[1:] if value.startswith(" ") else value
        if field == "data":
            data += value + "\n"
        elif field == "event":
            name = value
        elif field == "id" and "\0" not in value:
            last_id = value
    return events


def decode_all(stream: bytes) -> list[ServerEvent]:
    events, fault, is_open = read([stream], limits.MAX_EVENT_BYTES)
    assert fault is None
    assert not is_open
    return events


@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"])
def test_all_line_ends(end: bytes) -> None:
    stream = b"event: token" + end + b"id: 7" + end + b"data: a" + end + b"data: b" + end + end
    assert decode_all(stream) == [ServerEvent("a\nb", "token", "7")]


def test_the_standard_s_own_examples() -> None:
    stream = b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n\n"
    assert decode_all(stream) == [
        ServerEvent("first event", id="1"),
        ServerEvent("second event"),
        ServerEvent(" third event"),
    ]
    assert decode_all(b"data\n\ndata\ndata\n\n") == [ServerEvent(""), ServerEvent("\n")]
    assert decode_all(b"data:test\n\ndata: test\n\n") == [ServerEvent("test")] * 2


def test_a_stream_that_stops_inside_an_event_says_so() -> None:
    for tail in (b"data: a", b"data: a\n", b"event: error\n", b"\xef\xbb", b"da"):
        events, _, is_open = read([sse.DONE, tail] if tail[0] != 0xEF else [tail])
        assert is_open
        assert [event.is_done for event in events] in ([True], [])


def test_comments_and_keepalives_never_fill_the_bound() -> None:
    decoder = SseDecoder(max_event_bytes=100)
    for _ in range(1000):
        assert decoder.feed(sse.KEEPALIVE) == []
        assert decoder.feed(b": no blank line follows\n") == []
    assert not decoder.has_partial_event


def test_memory_is_bounded() -> None:
    decoder = SseDecoder(max_event_bytes=1000)
    with pytest.raises(ProtocolError, match="larger than 1000 bytes"):
        for _ in range(200):
            decoder.feed(b"data: 123456\n")
    with pytest.raises(ProtocolError):
        decoder.feed(b"\n\n")  # and stays refused
    with pytest.raises(ProtocolError):
        SseDecoder().feed(b"x" * (limits.MAX_EVENT_BYTES + 1))
    assert SseDecoder().feed(b"x" * limits.MAX_EVENT_BYTES) == []


def test_one_large_event_byte_by_byte_takes_linear_time() -> None:
    decoder = SseDecoder()
    stream = b"data: " + b"x" * 500_000 + b"\n\n"
    events = [event for i in range(len(stream)) for event in decoder.feed(stream[i : i + 1])]
    assert len(events[0].data) == 500_000


def test_bytes_that_are_not_utf8() -> None:
    assert read([b"data: ok\n\ndata: \xff\n\n"]) == ([ServerEvent("ok")], "an event is not UTF-8", True)
    assert decode_all(b": \xff\n\xff: x\ndata: ok\n\n") == [ServerEvent("ok")]  # ignored lines are not read


@given(any_json().filter(lambda value: _is_sendable(value)), st.data())
def test_what_is_encoded_is_decoded(value: Any, data: st.DataObject) -> None:
    stream = sse.encode_data(value, event="e", event_id="9") + sse.KEEPALIVE + sse.DONE
    decoder = SseDecoder()
    events = [event for piece in data.draw(cuts(stream)) for event in decoder.feed(piece)]
    assert events == [ServerEvent(wire.dump_json(value).decode(), "e", "9"), ServerEvent("[DONE]", id="9")]
    assert events[-1].is_done


def _is_sendable(value: Any) -> bool:
    try:
        wire.dump_json(value)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("text", ["a\nb", "a\rb", "a\0b"])
def test_fields_are_one_line(text: str) -> None:
    with pytest.raises(ValueError, match="one line"):
        sse.encode_data({}, event=text)


def test_errors_have_an_event_of_their_own() -> None:
    [event] = decode_all(sse.encode_error(InternalError("it broke")))
    assert event.event == "error"
    assert wire.load_json(event.data)["error"]["code"] == "internal_error"


# -- WebSocket ---------------------------------------------------------------------------------

SERVER = [wire.TokenMessage, wire.FinishMessage, wire.ErrorMessage, wire.PingMessage, wire.PongMessage]
CLIENT = [wire.GenerateMessage, wire.CancelMessage, wire.ResumeMessage, wire.CreditMessage, wire.PingMessage]


@given(st.one_of([instances(cls) for cls in CLIENT]))
def test_client_messages_there_and_back(message: Any) -> None:
    frame = sse.encode_message(message)
    assert sse.read_client_message(frame) == sse.read_client_message(frame.encode()) == message


@given(st.one_of([instances(cls) for cls in SERVER]))
def test_server_messages_there_and_back(message: Any) -> None:
    assert sse.read_server_message(sse.encode_message(message)) == message


@given(st.text() | st.binary())
def test_any_frame(frame: str | bytes) -> None:
    try:
        sse.read_client_message(frame)
    except LongshoreError as error:
        assert isinstance(error, InvalidRequestError)
    with pytest.raises(ProtocolError):
        sse.read_server_message(frame)


def test_frames_over_the_bound() -> None:
    for frame in ('"' + "x" * limits.MAX_WS_MESSAGE_BYTES, b'"' + b"x" * limits.MAX_WS_MESSAGE_BYTES):
        with pytest.raises(BodyTooLargeError):
            sse.read_client_message(frame)
    with pytest.raises(MalformedBodyError):
        sse.read_client_message('"' + "x" * (limits.MAX_WS_MESSAGE_BYTES - 1))
    with pytest.raises(ProtocolError, match="limit"):
        sse.read_server_message("x" * (limits.MAX_EVENT_BYTES + 1))
