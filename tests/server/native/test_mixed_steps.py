"""Steps in fixed shapes: every row has its numbers, what is free is harmless. No GPU is needed."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longshore.seeds import row_keys
from longshore_server.native import SamplingParams
from longshore_server.native.gpu import mixed_steps
from longshore_server.native.gpu.mixed_steps import (
    MAX_SPANS,
    NO_SLOT,
    PREFILL_BUCKETS,
    kept_places,
    pack,
    shape_of,
    shapes_of,
)
from longshore_server.native.scheduler import Chunk
from longshore_server.native.sequence import Sequence

BLOCK_SIZE, TILE_ROWS, SPARE = 16, 128, 999


def _chunk(index: int, num_computed: int, num_tokens: int, samples: bool, in_flight: bool) -> Chunk:
    num_known = num_computed + num_tokens - in_flight
    params = SamplingParams(temperature=0.5 * (index % 2), seed=index)
    sequence = Sequence(
        f"r{index}", [1000 * index + n for n in range(num_known)] or [7], params, max_model_len=4096
    )
    sequence.num_computed_tokens = num_computed
    num_blocks = -(-(num_computed + num_tokens) // BLOCK_SIZE)
    sequence.block_table = [100 * index + block for block in range(num_blocks)]
    return Chunk(sequence, num_tokens, samples)


@st.composite
def steps(draw) -> list[Chunk]:
    lengths = draw(st.lists(st.integers(2, PREFILL_BUCKETS[-1] // 4), max_size=4))
    decodes = [
        _chunk(index, draw(st.integers(1, 600)), 1, True, draw(st.booleans()))
        for index in range(draw(st.integers(0, 20)))
    ]
    prefills = [
        _chunk(50 + index, draw(st.integers(0, 3)) * BLOCK_SIZE, length, draw(st.booleans()), False)
        for index, length in enumerate(lengths)
    ]
    return decodes + prefills


@given(steps())
def test_every_row_has_its_numbers(chunks) -> None:
    shape = shape_of(chunks, TILE_ROWS)
    assert shape is not None
    seats = [10 * index + 3 for index in range(len(chunks))]
    numbers = np.full(shape.num_numbers, -77)
    pack(shape, chunks, seats, SPARE, BLOCK_SIZE, numbers)
    of = {name: numbers[place] for name, place in shape.fields.items()}
    used = np.zeros(shape.num_rows, dtype=bool)
    places = kept_places(shape, chunks)
    num_decodes = sum(chunk.num_tokens == 1 for chunk in chunks)
    assert shape in shapes_of(num_decodes, TILE_ROWS)
    for index, chunk in enumerate(chunks):
        sequence, end = chunk.sequence, chunk.sequence.num_computed_tokens + chunk.num_tokens
        last = of["kept_rows"][places[index]]
        rows = slice(last + 1 - chunk.num_tokens, last + 1)
        assert not used[rows].any()
        used[rows] = True
        positions = list(range(sequence.num_computed_tokens, end))
        known = sequence.token_ids[sequence.num_computed_tokens : end]
        assert of["tokens"][rows].tolist() == known + [-1] * (chunk.num_tokens - len(known))
        assert of["positions"][rows].tolist() == positions
        table = sequence.block_table
        wanted = [table[at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE for at in positions]
        assert of["slots"][rows].tolist() == wanted
        assert (of["token_seats"][rows] == seats[index]).all()
        kept = places[index]
        assert (of["kept_seats"][kept], of["kept_lens"][kept]) == (seats[index], end)
        assert of["sample_seats"][kept] == (seats[index] if chunk.samples else SPARE)
        if chunk.samples and not sequence.params.is_greedy:
            assert of["keys"][2 * kept : 2 * kept + 2].tolist() == list(
                row_keys(sequence.params.seed, sequence.next_offset)
            )
            assert of["temperatures"][kept : kept + 1].view(np.float64)[0] == 0.5
    assert (of["slots"][~used] == NO_SLOT).all() and (of["token_seats"][~used] == SPARE).all()
    assert (of["decode_lens"][num_decodes:] == 0).all()
    _check_tiles(of, chunks[num_decodes:])


def _check_tiles(of: dict[str, np.ndarray], prefills: list[Chunk]) -> None:
    """Each span's rows are in one tile each; free tiles belong to a span without rows."""
    covered = {
        (span, row)
        for span, offset in zip(of["tile_spans"].tolist(), of["tile_offsets"].tolist(), strict=True)
        for row in range(offset, min(offset + TILE_ROWS, int(of["span_rows"][span])))
    }
    assert covered == {(span, row) for span, c in enumerate(prefills) for row in range(c.num_tokens)}
    assert of["span_rows"][MAX_SPANS] == 0 and of["span_lens"][MAX_SPANS] == 0
    starts = of["first_rows"][: len(prefills)]
    assert (starts + of["span_rows"][: len(prefills)] <= of["tokens"].size).all()


@pytest.mark.parametrize(
    "chunks",
    [
        [_chunk(0, 0, mixed_steps.PREFILL_BUCKETS[-1] + 1, True, False)],
        [_chunk(index, 0, 2, True, False) for index in range(MAX_SPANS + 1)],
        [_chunk(index, 5, 1, True, False) for index in range(mixed_steps.DECODE_BUCKETS[-1] + 1)],
    ],
    ids=["rows", "spans", "decodes"],
)
def test_what_no_shape_holds_has_none(chunks) -> None:
    assert shape_of(chunks, TILE_ROWS) is None


def test_fields_are_apart_and_at_even_places() -> None:
    for num_decodes in mixed_steps.DECODE_BUCKETS:
        shape = mixed_steps.MixedShape(num_decodes, 64, TILE_ROWS)
        fields = sorted(shape.fields.values(), key=lambda field: field.start)
        assert all(field.start % 2 == 0 for field in fields)
        assert all(a.stop <= b.start for a, b in pairwise(fields))
        assert fields[-1].stop <= shape.num_numbers
