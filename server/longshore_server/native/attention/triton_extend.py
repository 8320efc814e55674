"""Prefill attention over pages: many rows per sequence, ragged, each seeing its context so far.

One launch serves all prefill chunks of a step, whatever prefix each has in the cache. The rows' own keys
stand in the pages already. Keys are read in blocks that begin at multiples of their length in the context, so
a row's result depends on its context and on the tile's shape, and not on the rows beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from longshore_server.native.attention.kv_cache import KVScales
from longshore_server.native.attention.triton_tiles import dot_precision, tile_side

LOG2_E = 1.4426950408889634
MAX_TILE_ROWS = 128


@dataclass(frozen=True, slots=True)
class ExtendSpans:
    """Prefill chunks and their cut into tiles of query rows, as int64 tensors on the device."""

    first_rows: torch.Tensor  # [spans]
    num_rows: torch.Tensor  # [spans]
    context_lens: torch.Tensor  # [spans], up to and including the chunk
    table_rows: torch.Tensor  # [spans]
    tile_spans: torch.Tensor  # [tiles]
    tile_offsets: torch.Tensor  # [tiles], the tile's first row within its span


@triton.jit
def _extend_kernel(
    query,
    key_pages,
    value_pages,
    tables,
    table_rows,
    first_rows,
    span_rows,
    context_lens,
    tile_spans,
    tile_offsets,
    key_scales,
    value_scales,
    output,
    scale,
    window,
    table_stride,
    query_stride_row,
    query_stride_head,
    BLOCK_SIZE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    IS_FP8: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head = tl.program_id(0)
    tile = tl.program_id(1)
    kv_head = head // (NUM_HEADS // NUM_KV_HEADS)
    span = tl.load(tile_spans + tile)
    offset = tl.load(tile_offsets + tile).to(tl.int32)
    num_rows = tl.load(span_rows + span).to(tl.int32)
    start = tl.load(context_lens + span).to(tl.int32) - num_rows  # position of the span's first row
    table = tables + tl.load(table_rows + span) * table_stride

    offsets = offset + tl.arange(0, BLOCK_ROWS)
    is_row = offsets < num_rows
    positions = start + offsets
    rows = tl.load(first_rows + span) + offsets
    key_dims = tl.arange(0, BLOCK_KEY)
    value_dims = tl.arange(0, BLOCK_VALUE)
    query_places = query + rows[:, None] * query_stride_row + head * query_stride_head + key_dims[None, :]
    q = tl.load(query_places, mask=is_row[:, None] & (key_dims[None, :] < KEY_DIM), other=0.0)
    if IS_FP8:
        scale *= tl.load(key_scales + kv_head)

    best = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    summed = tl.zeros([BLOCK_ROWS, BLOCK_VALUE], tl.float32)
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(start + offset - window + 1, 0)
    end = start + tl.minimum(offset + BLOCK_ROWS, num_rows)
    for token_tile in range(first // BLOCK_TOKENS, tl.cdiv(end, BLOCK_TOKENS)):
        tokens = token_tile * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        is_token = tokens < end
        page = tl.load(table + tokens // BLOCK_SIZE, mask=is_token, other=0).to(tl.int64)
        place = (page * BLOCK_SIZE + tokens % BLOCK_SIZE) * NUM_KV_HEADS + kv_head
        key_mask = is_token[None, :] & (key_dims[:, None] < KEY_DIM)
        key_places = key_pages + place[None, :] * KEY_DIM + key_dims[:, None]
        k = tl.load(key_places, mask=key_mask, other=0.0).to(q.dtype)
        scores = tl.dot(q, k, input_precision=PRECISION) * scale
        visible = tokens[None, :] <= positions[:, None]
        if HAS_WINDOW:
            visible &= tokens[None, :] > positions[:, None] - window
        scores = tl.where(visible, scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))
        anchor = tl.where(new_best == float("-inf"), 0.0, new_best)  # a row may see nothing of a tile
        weights = tl.exp2(scores - anchor[:, None])
        shrink = tl.exp2(best - anchor)
        total = total * shrink + tl.sum(weights, 1)
        value_mask = is_token[:, None] & (value_dims[None, :] < VALUE_DIM)
        value_places = value_pages + place[:, None] * VALUE_DIM + value_dims[None, :]
        v = tl.load(value_places, mask=value_mask, other=0.0).to(q.dtype)
        summed = summed * shrink[:, None] + tl.dot(weights.to(q.dtype), v, input_precision=PRECISION)
        best = new_best

    result = summed / tl.where(total > 0, total, 1.0)[:, None]
    if IS_FP8:
        result *= tl.load(value_scales + kv_head)
    places = output + (rows[:, None] * NUM_HEADS + head) * VALUE_DIM + value_dims[None, :]
    mask = is_row[:, None] & (value_dims[None, :] < VALUE_DIM)
    tl.store(places, result.to(output.dtype.element_ty), mask=mask)


def tile_rows(head_dim: int, dtype: torch.dtype, most: int = MAX_TILE_ROWS) -> int:
    """Query rows per tile for this head size; ExtendSpans are cut by it."""
    return min(most, MAX_TILE_ROWS if head_dim <= 128 and dtype != torch.float32 else 32)


def extend_attention(
    query: torch.Tensor,  # [tokens, num_heads, key_dim]
    key_pages: torch.Tensor,  # [blocks, block_size, num_kv_heads, key_dim]
    value_pages: torch.Tensor,  # [blocks, block_size, num_kv_heads, value_dim]
    tables: torch.Tensor,  # [table rows, blocks] int32
    spans: ExtendSpans,
    scales: KVScales,
    scale: float,
    window: int | None,
    output: torch.Tensor,  # [tokens, num_heads, value_dim], contiguous
    most_tile_rows: int = MAX_TILE_ROWS,  # as the spans are cut
) -> None:
    """Attends the spans' rows; fills those rows of `output` and no other."""
    num_heads, key_dim = query.shape[1:]
    _, block_size, num_kv_heads, value_dim = value_pages.shape
    rows = query if query.stride(2) == 1 else query.contiguous()
    block_rows = tile_rows(max(key_dim, value_dim), query.dtype, most_tile_rows)
    _extend_kernel[(num_heads, spans.tile_spans.shape[0])](
        rows,
        key_pages,
        value_pages,
        tables,
        spans.table_rows,
        spans.first_rows,
        spans.num_rows,
        spans.context_lens,
        spans.tile_spans,
        spans.tile_offsets,
        scales.key,
        scales.value,
        output,
        scale * LOG2_E,
        window or 0,
        tables.stride(0),
        rows.stride(0),
        rows.stride(1),
        BLOCK_SIZE=block_size,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        KEY_DIM=key_dim,
        BLOCK_KEY=tile_side(key_dim),
        VALUE_DIM=value_dim,
        BLOCK_VALUE=tile_side(value_dim),
        BLOCK_ROWS=block_rows,
        BLOCK_TOKENS=64 if block_rows > 32 else 32,
        HAS_WINDOW=window is not None,
        IS_FP8=key_pages.dtype == torch.float8_e4m3fn,
        PRECISION=dot_precision(query.dtype),
        num_warps=8 if block_rows == 128 else 4,
        num_stages=2,
    )
