"""A step of the first rank as the other ranks repeat it on their GPUs: every rank draws its tokens itself.

A rank that launches ahead of the host cannot be told tokens that nobody has seen yet, so it keeps them on its
own GPU, and needs of each sequence what a draw needs. Told is what changed: settings once, tables by their
new blocks. Numbers are 64-bit integers, settings are JSON; it does no I/O.
"""

from __future__ import annotations

import json
import struct
from array import array
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from longshore_server.native.errors import InvalidRequestError, RankProtocolError
from longshore_server.native.ranks.messages import TokenWindow
from longshore_server.native.sampling_params import SamplingParams
from longshore_server.native.scheduler import Chunk
from longshore_server.native.sequence import Sequence, SequenceStatus

ON_GPU = -1  # stands for a token that the host has not seen
DRAW_FIELDS = ("temperature", "top_p", "top_k", "min_p", "seed")
_LENGTH = struct.Struct("<I")
_INT = array("q").typecode
_CHUNK_INTS = 7


@dataclass(slots=True)
class _Told:
    """What the other ranks know of a sequence."""

    number: int
    table: list[int] = field(default_factory=list)  # the sequence's own list, to notice a new one
    num_blocks: int = 0


class StepTeller:
    """The first rank's side; `payload` is to be told in the order of the launches."""

    def __init__(self) -> None:
        self._told: dict[Sequence, _Told] = {}
        self._numbers = count()

    def payload(self, chunks: SequenceOf[Chunk], drawn: Mapping[Sequence, int]) -> bytes:
        """`drawn` has tokens in flight that the host has chosen itself, and so the others cannot know."""
        gone = [s for s in self._told if s.status is not SequenceStatus.RUNNING]
        numbers = array(_INT, [len(gone), *(self._told.pop(s).number for s in gone), len(chunks)])
        settings = [self._introduce(c.sequence) for c in chunks if c.sequence not in self._told]
        for chunk in chunks:
            self._add(numbers, chunk, drawn)
        head = json.dumps(settings).encode() if settings else b""
        return _LENGTH.pack(len(head)) + head + numbers.tobytes()

    def _introduce(self, sequence: Sequence) -> list[Any]:
        self._told[sequence] = told = _Told(next(self._numbers))
        settings = {name: getattr(sequence.params, name) for name in DRAW_FIELDS}
        return [told.number, sequence.num_prompt_tokens, settings]

    def _add(self, numbers: array[int], chunk: Chunk, drawn: Mapping[Sequence, int]) -> None:
        sequence = chunk.sequence
        told, table, start = self._told[sequence], sequence.block_table, chunk.start
        is_new = told.table is not table
        blocks = table if is_new else table[told.num_blocks :]
        told.table, told.num_blocks = table, len(table)
        tokens = sequence.token_ids[start : chunk.context_len]
        if len(tokens) < chunk.num_tokens:
            tokens = [*tokens, drawn.get(sequence, ON_GPU)]
        numbers.extend((told.number, start, chunk.num_tokens, chunk.samples, sequence.next_offset))
        numbers.extend((is_new, len(blocks), *blocks, *tokens))


class MirroredSequence:
    """A sequence of the first rank, as far as a step on a GPU reads it; equal only to itself."""

    __slots__ = (
        "block_table",
        "images",
        "next_offset",
        "num_computed_tokens",
        "num_prompt_tokens",
        "params",
        "status",
        "token_ids",
    )

    def __init__(self, num_prompt_tokens: int, params: SamplingParams) -> None:
        self.num_prompt_tokens = num_prompt_tokens
        self.params = params
        self.status = SequenceStatus.RUNNING
        self.block_table: list[int] = []
        self.images = ()
        self.next_offset = 0
        self.num_computed_tokens = 0
        self.token_ids = TokenWindow(0, [])


class StepReader:
    """The other ranks' side: payloads, in their order, to chunks of mirrored sequences."""

    def __init__(self) -> None:
        self._sequences: dict[int, MirroredSequence] = {}

    def read(self, payload: bytes) -> list[Chunk]:
        """Raises RankProtocolError on anything that a StepTeller does not say."""
        try:
            return self._read(payload)
        except (ValueError, KeyError, IndexError, TypeError, struct.error, InvalidRequestError) as error:
            raise RankProtocolError(f"a step is not sound: {type(error).__name__}: {error}") from None

    def _read(self, payload: bytes) -> list[Chunk]:
        (head_bytes,) = _LENGTH.unpack_from(payload)
        head, body = payload[_LENGTH.size :][:head_bytes], payload[_LENGTH.size + head_bytes :]
        numbers = array(_INT)
        numbers.frombytes(body)
        num_gone = numbers[0]
        for number in numbers[1 : 1 + num_gone]:
            self._sequences.pop(number).status = SequenceStatus.FINISHED
        for number, num_prompt_tokens, values in json.loads(head) if head else ():
            if not isinstance(num_prompt_tokens, int):
                raise ValueError("a sequence's prompt has no length")
            self._sequences[number] = MirroredSequence(num_prompt_tokens, SamplingParams(**values))
        chunks: list[Chunk] = []
        place = 2 + num_gone
        for _ in range(numbers[1 + num_gone]):
            place = self._take(numbers, place, chunks)
        if place != len(numbers):
            raise ValueError(f"{len(numbers)} numbers where {place} were expected")
        return chunks

    def _take(self, numbers: array[int], place: int, chunks: list[Chunk]) -> int:
        header = numbers[place : place + _CHUNK_INTS]
        number, start, num_tokens, samples, next_offset, is_new, num_blocks = header
        if start < 0 or num_tokens < 1 or num_blocks < 0:
            raise ValueError("a chunk's header holds what cannot be")
        tokens_at = place + _CHUNK_INTS + num_blocks
        end = tokens_at + num_tokens
        blocks = numbers[place + _CHUNK_INTS : tokens_at].tolist()
        tokens = numbers[tokens_at:end].tolist()
        sequence = self._sequences[number]
        if is_new:
            sequence.block_table = blocks
        else:
            sequence.block_table += blocks
        sequence.num_computed_tokens, sequence.next_offset = start, next_offset
        sequence.token_ids = TokenWindow(start, tokens)
        chunks.append(Chunk(sequence, num_tokens, bool(samples)))  # type: ignore[arg-type]
        return end
