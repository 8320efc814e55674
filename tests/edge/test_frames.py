"""Cutting streams into frames gives the same events as the full decoder, however the bytes arrive."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longshore.errors import ProtocolError
from longshore.sse import SseDecoder, encode_data
from longshore_edge.frames import FrameReader, is_plain, num_tokens, split, split_plain_head


def chunk(text: str, finish: str | None = None) -> bytes:
    mark = {"segment": 0, "offset": 0}
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    return encode_data({"choices": [choice], "longshore": {"mark": mark}})


frames = st.lists(
    st.text().map(chunk) | st.sampled_from([b": keepalive\n\n", chunk("", "stop"), b"data: [DONE]\n\n"]),
    max_size=8,
).map(b"".join)


@given(frames, st.lists(st.integers(1, 40)), st.sampled_from([b"\n", b"\r\n", b"\r"]))
def test_same_events_as_the_decoder(data: bytes, cuts: list[int], ending: bytes) -> None:
    data = data.replace(b"\n", ending)
    reader, blocks, position = FrameReader(), [], 0
    for size in [*cuts, len(data)]:
        blocks.append(reader.feed(data[position : position + size]))
        position += size
    # A CR at the very end is held until its LF could have come.
    blocks.append(reader.feed(b"\n") if data.endswith(b"\r") else b"")
    whole = SseDecoder()
    expected = whole.feed(data) + whole.feed(b"\n")
    got = []
    for block in blocks:
        for frame in split(block):
            got += SseDecoder().feed(frame)
    assert [event.data for event in got] == [event.data for event in expected]
    assert not reader.has_partial_frame


@given(st.text(), st.text())
def test_only_token_chunks_are_plain(first: str, second: str) -> None:
    block = chunk(first) + chunk(second)
    assert num_tokens(block) == 2
    assert not is_plain(block + chunk(first, "stop"))
    assert not is_plain(block + b"data: [DONE]\n\n")
    assert not is_plain(b": keepalive\n\n" + block)
    assert not is_plain(block + encode_data({"error": {"code": "x"}}, event="error"))
    assert not is_plain(block + encode_data({"choices": [], "longshore": {"report": {}}}))


@given(frames)
def test_the_plain_head_is_plain_and_nothing_is_lost(block: bytes) -> None:
    head, rest = split_plain_head(block)
    assert head + rest == block
    assert not head or is_plain(head)


def test_the_head_goes_up_to_the_finish() -> None:
    tokens, end = chunk("a") + chunk("b"), chunk("", "stop")
    assert split_plain_head(tokens + end + tokens) == (tokens, end + tokens)
    assert split_plain_head(end) == (b"", end)
    assert split_plain_head(tokens) == (b"", tokens)


def test_ordinary_text_is_plain() -> None:
    assert is_plain(chunk("Hello") + chunk(' "quoted" \n line'))


def test_a_frame_without_end_is_refused() -> None:
    reader = FrameReader(max_frame_bytes=100)
    with pytest.raises(ProtocolError):
        for _ in range(10):
            reader.feed(b"data: " + b"x" * 20)
