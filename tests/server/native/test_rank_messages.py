"""The messages between ranks: what one side packs the other reads, and nothing else is taken."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longshore_server.native import SamplingParams
from longshore_server.native.errors import RankProtocolError
from longshore_server.native.ranks.messages import (
    Kind,
    MessageDecoder,
    blocks_payload,
    frame,
    pong_payload,
    read_blocks,
    read_pong,
    read_step,
    step_payload,
)
from longshore_server.native.scheduler import Chunk
from longshore_server.native.sequence import Sequence

TOKEN = st.integers(0, 2**31 - 1)


@st.composite
def chunks(draw: st.DrawFn) -> Chunk:
    tokens = draw(st.lists(TOKEN, min_size=1, max_size=20))
    sequence = Sequence("r", tokens, SamplingParams(), max_model_len=64)
    sequence.num_computed_tokens = draw(st.integers(0, len(tokens) - 1))
    sequence.block_table = draw(st.lists(TOKEN, max_size=9))
    num_tokens = draw(st.integers(1, sequence.num_uncomputed_tokens))
    return Chunk(sequence, num_tokens, num_tokens == sequence.num_uncomputed_tokens)


@given(st.lists(chunks(), max_size=5))
def test_a_step_is_read_as_it_was_packed(step: list[Chunk]) -> None:
    read = read_step(step_payload(step))
    assert len(read) == len(step)
    for ours, theirs in zip(step, read, strict=True):
        start = ours.sequence.num_computed_tokens
        places = slice(start, start + ours.num_tokens)
        assert (theirs.num_tokens, theirs.samples) == (ours.num_tokens, ours.samples)
        assert theirs.sequence.num_computed_tokens == start
        assert theirs.sequence.num_prompt_tokens == ours.sequence.num_prompt_tokens
        assert theirs.sequence.token_ids[places] == ours.sequence.token_ids[places]
        assert theirs.sequence.block_table == ours.sequence.block_table


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_refused(data: bytes) -> None:
    for read in (read_step, read_blocks, read_pong):
        with contextlib.suppress(RankProtocolError):
            read(data)
    with contextlib.suppress(RankProtocolError):
        list(MessageDecoder().feed(data))


@given(st.lists(st.tuples(st.sampled_from(Kind), st.binary(max_size=30)), max_size=6), st.integers(1, 9))
def test_messages_survive_any_cut(messages: list[tuple[Kind, bytes]], size: int) -> None:
    data = b"".join(frame(*message) for message in messages)
    decoder = MessageDecoder()
    pieces = [data[i : i + size] for i in range(0, len(data), size)]
    assert [message for piece in pieces for message in decoder.feed(piece)] == messages


def test_small_messages() -> None:
    assert read_blocks(blocks_payload([3, 1, 2])) == [3, 1, 2]
    assert read_pong(pong_payload(7, 2**32 + 5)) == (7, 5)
    with pytest.raises(RankProtocolError, match="not in the table"):
        list(MessageDecoder().feed(b"\x63" + bytes(4)))
