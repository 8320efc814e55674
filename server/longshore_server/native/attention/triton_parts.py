"""Cuts the contexts of a step's decodes into parts, one for each program of a decode kernel and KV head.

All layers share the cut, so it is made once a step, on the GPU: a captured launch fits every context length.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from longshore_server.native.attention.triton_decode import NUM_PROGRAMS_WANTED, fills_gpu

TILE_TOKENS = 64  # parts end at multiples of it, counted from the first token
# A part is worth its adding up from so many tiles on, before and after the rows alone fill the GPU.
MIN_TILES, MIN_TILES_WHEN_FULL = 2, 8
MIN_SPARE_PARTS = 8  # for contexts that are longer than the others
MAX_ROWS = 64
NUM_FIELDS = 8  # of a part: its row, first tile, end tile, the row's first part, the row's parts


@triton.jit(
    do_not_specialize=["num_rows", "num_parts", "min_tiles"], do_not_specialize_on_alignment=["context_lens"]
)  # one form for every number of rows: each takes a while to compile
def _parts_kernel(
    context_lens, parts, num_rows, num_parts, min_tiles,
    TILE: tl.constexpr, NUM_FIELDS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    """No part ends in another row; parts that are left over have no row: -1."""
    rows = tl.arange(0, BLOCK_ROWS)
    lens = tl.load(context_lens + rows, mask=rows < num_rows, other=0).to(tl.int32)
    tiles = tl.cdiv(tl.maximum(lens - 1, 0), TILE)  # the newest token is not in the cache yet
    # With shares of this size the rows have no more parts than there are.
    share = tl.maximum(tl.cdiv(tl.sum(tiles), num_parts - num_rows), min_tiles)
    counts = tl.where(rows < num_rows, tl.maximum(tl.cdiv(tiles, share), 1), 0)
    ends = tl.cumsum(counts, 0)

    numbers = tl.arange(0, BLOCK_PARTS)
    row = tl.sum((ends[None, :] <= numbers[:, None]).to(tl.int32), 1)
    is_row = rows[None, :] == row[:, None]
    count = tl.sum(tl.where(is_row, counts[None, :], 0), 1)
    first = tl.sum(tl.where(is_row, (ends - counts)[None, :], 0), 1)
    row_tiles = tl.sum(tl.where(is_row, tiles[None, :], 0), 1)
    even = tl.cdiv(row_tiles, tl.maximum(count, 1))
    low = tl.minimum((numbers - first) * even, row_tiles)
    place = parts + numbers * NUM_FIELDS
    mask = numbers < num_parts
    tl.store(place, tl.where(count > 0, row, -1), mask=mask)
    tl.store(place + 1, low, mask=mask)
    tl.store(place + 2, tl.minimum(low + even, row_tiles), mask=mask)
    tl.store(place + 3, first, mask=mask)
    tl.store(place + 4, count, mask=mask)


def part_count(num_rows: int, num_kv_heads: int) -> int:
    """Parts that so many rows have room for, each row one at least."""
    wanted = -(-NUM_PROGRAMS_WANTED // num_kv_heads)
    return max(num_rows + MIN_SPARE_PARTS, 0 if fills_gpu(num_rows, num_kv_heads) else wanted)


def cut_contexts(context_lens: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """int32 [parts, NUM_FIELDS] for MAX_ROWS or fewer `context_lens` [rows], whose last tokens are not cut.

    A row of one token or none has a part without tiles.
    """
    num_rows = len(context_lens)
    num_parts = part_count(num_rows, num_kv_heads)
    parts = torch.empty(num_parts, NUM_FIELDS, dtype=torch.int32, device=context_lens.device)
    min_tiles = MIN_TILES_WHEN_FULL if fills_gpu(num_rows, num_kv_heads) else MIN_TILES
    most_parts = max(part_count(1, num_kv_heads), part_count(MAX_ROWS, num_kv_heads))
    _parts_kernel[(1,)](
        context_lens, parts, num_rows, num_parts, min_tiles,
        TILE=TILE_TOKENS, NUM_FIELDS=NUM_FIELDS,
        BLOCK_ROWS=MAX_ROWS, BLOCK_PARTS=triton.next_power_of_2(most_parts), num_warps=8,
    )  # fmt: skip
    return parts
