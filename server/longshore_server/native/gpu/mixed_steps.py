"""A step of decodes and short prefills in one of a few fixed shapes, so that a captured graph can hold it.

Launching a deep model's kernels one by one takes the host longer than a small step takes the GPU. A shape has
room for so many decodes and so many prefill rows in a bounded number of spans; what stays free belongs to the
spare seat, has no slot and no context. It packs numbers and runs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np

from longshore_server.native.attention.layout import cut_tiles
from longshore_server.native.gpu.graphs import bucket_of, buckets_up_to
from longshore_server.native.gpu.step_inputs import (
    even,
    noise_keys,
    slots,
    temperature_bits,
    token_ids,
)
from longshore_server.native.scheduler import Chunk

NO_SLOT = -1
DECODE_BUCKETS = (0, 16, 64, 128, 256)
PREFILL_BUCKETS = (64, 128, 256, 384, 512, 768, 1024)
MAX_SPANS = 16


@dataclass(frozen=True)
class MixedShape:
    """Rows: `num_decodes` single ones, then `num_prefill` of up to MAX_SPANS chunks; see `fields`."""

    num_decodes: int
    num_prefill: int
    tile_rows: int

    @property
    def num_rows(self) -> int:
        return self.num_decodes + self.num_prefill

    @property
    def num_kept(self) -> int:
        """Rows whose logits are computed: each decode and the last row of each span."""
        return self.num_decodes + MAX_SPANS

    @property
    def num_tiles(self) -> int:
        """Each span fills its tiles but for the last one."""
        return self.num_prefill // self.tile_rows + MAX_SPANS

    @cached_property
    def fields(self) -> dict[str, slice]:
        """Where each field stands in the packed int64 numbers; each at an even place, as kernels want it."""
        spans = MAX_SPANS + 1  # the last one is empty: free tiles belong to it
        sizes = {
            **dict.fromkeys(("tokens", "positions", "token_seats", "slots"), self.num_rows),
            **dict.fromkeys(("decode_seats", "decode_lens", "decode_prompt_lens"), self.num_decodes),
            **dict.fromkeys(("first_rows", "span_rows", "span_lens", "span_seats"), spans),
            **dict.fromkeys(("tile_spans", "tile_offsets"), self.num_tiles),
            **dict.fromkeys(("kept_rows", "kept_seats", "kept_lens", "kept_prompt_lens"), self.num_kept),
            "sample_seats": self.num_kept,
            "temperatures": self.num_kept,
            "keys": 2 * self.num_kept,
        }
        starts = accumulate(map(even, sizes.values()), initial=0)
        return {name: slice(start, start + sizes[name]) for name, start in zip(sizes, starts, strict=False)}

    @cached_property
    def num_numbers(self) -> int:
        return max(even(field.stop) for field in self.fields.values())


def shape_of(chunks: SequenceOf[Chunk], tile_rows: int) -> MixedShape | None:
    """The smallest shape for chunks whose single rows come first; None where none is large enough."""
    num_decodes = sum(chunk.num_tokens == 1 for chunk in chunks)
    num_prefill = sum(chunk.num_tokens for chunk in chunks[num_decodes:])
    decodes = bucket_of(num_decodes, DECODE_BUCKETS)
    prefill = bucket_of(num_prefill, PREFILL_BUCKETS)
    if decodes is None or prefill is None or len(chunks) - num_decodes > MAX_SPANS:
        return None
    return MixedShape(decodes, prefill, tile_rows)


def shapes_of(most_decodes: int, tile_rows: int) -> list[MixedShape]:
    """Every shape that steps of up to `most_decodes` decodes may have, the smallest first."""
    decodes = buckets_up_to(most_decodes, DECODE_BUCKETS)
    return [MixedShape(each, prefill, tile_rows) for each in decodes for prefill in PREFILL_BUCKETS]


def kept_places(shape: MixedShape, chunks: SequenceOf[Chunk]) -> list[int]:
    """Where each chunk's last row stands among the kept rows."""
    num_decodes = sum(chunk.num_tokens == 1 for chunk in chunks)
    spans = range(shape.num_decodes, shape.num_decodes + len(chunks) - num_decodes)
    return [*range(num_decodes), *spans]


def pack(
    shape: MixedShape,
    chunks: SequenceOf[Chunk],
    seats: SequenceOf[int],
    spare_seat: int,
    block_size: int,
    numbers: np.ndarray,  # [shape.num_numbers] int64, overwritten
) -> None:
    """Writes the step as `shape.fields` says; tokens that the host has not seen are ON_GPU."""
    numbers[:] = 0
    of = {name: numbers[place] for name, place in shape.fields.items()}
    for name in ("token_seats", "decode_seats", "span_seats", "kept_seats", "sample_seats"):
        of[name][:] = spare_seat
    of["slots"][:] = NO_SLOT
    num_decodes = sum(chunk.num_tokens == 1 for chunk in chunks)
    firsts = [*range(num_decodes)]
    firsts += accumulate((c.num_tokens for c in chunks[num_decodes:-1]), initial=shape.num_decodes)
    lens = [chunk.context_len for chunk in chunks]
    for first, chunk, seat, end in zip(firsts, chunks, seats, lens, strict=False):
        rows = slice(first, first + chunk.num_tokens)
        of["tokens"][rows] = token_ids(chunk)
        of["positions"][rows] = np.arange(end - chunk.num_tokens, end)
        of["token_seats"][rows] = seat
        of["slots"][rows] = slots(chunk, block_size)
    of["decode_seats"][:num_decodes] = seats[:num_decodes]
    of["decode_lens"][:num_decodes] = lens[:num_decodes]
    of["decode_prompt_lens"][:num_decodes] = [c.sequence.num_prompt_tokens for c in chunks[:num_decodes]]
    _pack_spans(
        of, shape, chunks[num_decodes:], firsts[num_decodes:], lens[num_decodes:], seats[num_decodes:]
    )
    _pack_kept(of, kept_places(shape, chunks), chunks, firsts, lens, seats)


def _pack_spans(
    of: dict[str, np.ndarray],
    shape: MixedShape,
    chunks: SequenceOf[Chunk],
    firsts: SequenceOf[int],
    lens: SequenceOf[int],
    seats: SequenceOf[int],
) -> None:
    num_spans = len(chunks)
    num_rows = [chunk.num_tokens for chunk in chunks]
    columns = {"first_rows": firsts, "span_rows": num_rows, "span_lens": lens, "span_seats": seats}
    for name, values in columns.items():
        of[name][:num_spans] = values
    tile_spans, tile_offsets = cut_tiles(num_rows, shape.tile_rows)
    of["tile_spans"][:] = MAX_SPANS
    of["tile_spans"][: len(tile_spans)] = tile_spans
    of["tile_offsets"][: len(tile_offsets)] = tile_offsets


def _pack_kept(
    of: dict[str, np.ndarray],
    places: list[int],
    chunks: SequenceOf[Chunk],
    firsts: SequenceOf[int],
    lens: SequenceOf[int],
    seats: SequenceOf[int],
) -> None:
    """A chunk that does not sample has its row computed as well, and its token left at the spare seat."""
    of["kept_rows"][places] = [first + c.num_tokens - 1 for first, c in zip(firsts, chunks, strict=False)]
    of["kept_seats"][places] = seats
    of["kept_lens"][places] = lens
    of["kept_prompt_lens"][places] = [chunk.sequence.num_prompt_tokens for chunk in chunks]
    sampling = [index for index, chunk in enumerate(chunks) if chunk.samples]
    if sampling:
        rows = [places[index] for index in sampling]
        sequences = [chunks[index].sequence for index in sampling]
        of["sample_seats"][rows] = [seats[index] for index in sampling]
        of["temperatures"][rows] = temperature_bits(sequences)
        of["keys"].reshape(-1, 2)[rows] = noise_keys(sequences).reshape(-1, 2)
