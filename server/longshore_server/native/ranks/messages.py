"""The closed table of messages between the first rank and the others, and their framing. Free of I/O.

A kind and a length, then integers (steps, moves), or UTF-8 text (the start, errors): never pickle.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

from longshore_server.native.errors import RankProtocolError
from longshore_server.native.scheduler import Chunk

MAX_PAYLOAD_BYTES = 256 * 1024 * 1024
_HEADER = struct.Struct("<BI")  # kind, payload bytes
_PONG = struct.Struct("<II")  # the ping's serial, the collectives that the rank has taken part in
_CHUNK_HEADER_INTS = 5
_INT = array("i").typecode


class Kind(IntEnum):
    """What a message says. Down: SETUP, STEP, CLEAR, PING, MIRROR, MOVE, FETCH. Up: the others."""

    SETUP = 1
    STEP = 2
    CLEAR = 3
    PING = 4
    READY = 5
    FAILED = 6
    BEAT = 7
    PONG = 8
    MIRROR = 9  # a step on GPUs, see `mirror`
    MOVE = 10  # KV blocks out and in, see `moves`
    FETCH = 11
    FETCHED = 12


@dataclass(frozen=True, slots=True)
class TokenWindow:
    """The tokens of a sequence from `start` on, read by their places in the whole sequence."""

    start: int
    tokens: list[int]

    def __getitem__(self, places: slice) -> list[int]:
        return self.tokens[places.start - self.start : places.stop - self.start]


@dataclass(frozen=True, slots=True)
class RemoteSequence:
    """What a rank that does not schedule knows of a sequence: enough for one forward pass."""

    num_prompt_tokens: int
    num_computed_tokens: int
    token_ids: TokenWindow
    block_table: list[int]


def frame(kind: Kind, payload: bytes = b"") -> bytes:
    return _HEADER.pack(kind, len(payload)) + payload


def step_payload(chunks: Sequence[Chunk]) -> bytes:
    """For each chunk five counts (see `read_step`), then its tokens, then the sequence's block table."""
    numbers = array(_INT, [len(chunks)])
    for chunk in chunks:
        sequence, start = chunk.sequence, chunk.start
        table = sequence.block_table
        numbers.extend((sequence.num_prompt_tokens, start, chunk.num_tokens, chunk.samples, len(table)))
        numbers.extend(sequence.token_ids[start : chunk.context_len])
        numbers.extend(table)
    return numbers.tobytes()


def read_step(payload: bytes) -> list[Chunk]:
    """The chunks of a step, each with a RemoteSequence; raises RankProtocolError on anything else."""
    numbers = read_ints(payload, _INT)
    place = 1
    chunks: list[Chunk] = []
    for _ in range(numbers[0] if numbers else -1):
        header = numbers[place : place + _CHUNK_HEADER_INTS]
        place += _CHUNK_HEADER_INTS
        if len(header) < _CHUNK_HEADER_INTS or min(header) < 0 or header[2] < 1:
            raise RankProtocolError("a step's chunk has no sound header")
        num_prompt_tokens, start, num_tokens, samples, num_blocks = header
        tokens = numbers[place : place + num_tokens]
        table = numbers[place + num_tokens : place + num_tokens + num_blocks]
        place += num_tokens + num_blocks
        sequence = RemoteSequence(num_prompt_tokens, start, TokenWindow(start, tokens), table)
        chunks.append(Chunk(sequence, num_tokens, bool(samples)))  # type: ignore[arg-type]
    if place != len(numbers):
        raise RankProtocolError(f"a step of {len(numbers)} numbers holds {place}")
    return chunks


def blocks_payload(blocks: Sequence[int]) -> bytes:
    return array(_INT, blocks).tobytes()


def read_blocks(payload: bytes) -> list[int]:
    return read_ints(payload, _INT)


def pong_payload(serial: int, num_collectives: int) -> bytes:
    return _PONG.pack(serial, num_collectives % 2**32)


def read_pong(payload: bytes) -> tuple[int, int]:
    try:
        serial, num_collectives = _PONG.unpack(payload)
    except struct.error as error:
        raise RankProtocolError(f"a pong is not sound: {error}") from None
    return serial, num_collectives


def read_ints(payload: bytes, typecode: str) -> list[int]:
    """Whole numbers of one type of `array`; raises RankProtocolError."""
    numbers = array(typecode)
    if len(payload) % numbers.itemsize:
        raise RankProtocolError(f"{len(payload)} bytes are not whole numbers")
    numbers.frombytes(payload)
    return numbers.tolist()


class MessageDecoder:
    """Cuts a byte stream into messages; raises RankProtocolError on what is not in the table."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[Kind, bytes]]:
        self._buffer += data
        while len(self._buffer) >= _HEADER.size:
            number, payload_bytes = _HEADER.unpack_from(self._buffer)
            if payload_bytes > MAX_PAYLOAD_BYTES or number not in Kind._value2member_map_:
                raise RankProtocolError(f"kind {number} with {payload_bytes} bytes is not in the table")
            end = _HEADER.size + payload_bytes
            if len(self._buffer) < end:
                return
            payload = bytes(self._buffer[_HEADER.size : end])
            del self._buffer[:end]
            yield Kind(number), payload
