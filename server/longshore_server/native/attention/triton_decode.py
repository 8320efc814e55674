"""Decode attention over pages: one query row per sequence, its context cut into a fixed number of splits.

The query heads of one KV head are rows of one tensor-core tile, so each key is read once. The split count
depends on shapes alone, so a captured launch fits every context length (flash-decoding, Dao et al., 2023).
Splits that a short context leaves empty end at once; of the others the last to finish adds up all, in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from longshore_server.native.attention.interface import PickedPages
from longshore_server.native.attention.kv_cache import KVScales
from longshore_server.native.attention.triton_tiles import dot_precision, tile_side
from longshore_server.native.gpu.triton_overlap import has_dependent_launch, wait_for_previous

LOG2_E = 1.4426950408889634
# Enough programs to fill a GPU of this many multiprocessors a few times over.
NUM_PROGRAMS_WANTED = 4 * 132
MAX_SPLITS = 64
# Once the batch alone fills the GPU, a split is worth its adding up from so many tiles of tokens on.
MIN_TILES_IN_BATCH = 4


# One form for every number of rows: each takes half a second to compile, in a step that waits for it.
@triton.jit(do_not_specialize=["num_splits", "min_tiles", "window", "table_stride", "picked_stride"])
def _decode_kernel(
    query,
    key_pages,
    value_pages,
    tables,
    table_rows,
    context_lens,
    key_scales,
    value_scales,
    output,
    partial_output,
    partial_lse,
    arrivals,
    picked_tables,
    picked_lens,
    scale,
    window,
    num_splits,
    min_tiles,
    table_stride,
    picked_stride,
    query_stride_row,
    query_stride_head,
    BLOCK_SIZE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_PICKED: tl.constexpr,
    IS_FP8: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    wait_for_previous(PDL)
    context = tl.load(context_lens + row).to(tl.int32)
    table = tables + tl.load(table_rows + row).to(tl.int64) * table_stride
    if HAS_PICKED:
        picked_len = tl.load(picked_lens + row).to(tl.int32)
        if picked_len > 0:
            context = picked_len
            table = picked_tables + (row * NUM_KV_HEADS + kv_head).to(tl.int64) * picked_stride
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(context - window, 0)
    first_tile = first // BLOCK_TOKENS
    end_tile = tl.cdiv(context, BLOCK_TOKENS)
    num_tiles = end_tile - first_tile
    tiles_per_split = tl.maximum(tl.cdiv(num_tiles, num_splits), min_tiles)
    num_busy = tl.cdiv(num_tiles, tiles_per_split)
    if split >= tl.maximum(num_busy, 1):  # an empty context still gets its zeros
        return
    low = first_tile + split * tiles_per_split
    high = tl.minimum(low + tiles_per_split, end_tile)

    groups = tl.arange(0, BLOCK_GROUP)
    key_dims = tl.arange(0, BLOCK_KEY)
    value_dims = tl.arange(0, BLOCK_VALUE)
    heads = kv_head * GROUP + groups
    query_offsets = heads[:, None] * query_stride_head + key_dims[None, :]
    query_mask = (groups[:, None] < GROUP) & (key_dims[None, :] < KEY_DIM)
    q = tl.load(query + row.to(tl.int64) * query_stride_row + query_offsets, mask=query_mask, other=0.0)
    if IS_FP8:
        scale *= tl.load(key_scales + kv_head)

    best = tl.full([BLOCK_GROUP], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_GROUP], tl.float32)
    summed = tl.zeros([BLOCK_GROUP, BLOCK_VALUE], tl.float32)
    for tile in range(low, high):
        tokens = tile * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        visible = (tokens >= first) & (tokens < context)
        page = tl.load(table + tokens // BLOCK_SIZE, mask=visible, other=0).to(tl.int64)
        slot = page * BLOCK_SIZE + tokens % BLOCK_SIZE
        key_offsets = (slot * NUM_KV_HEADS + kv_head)[None, :] * KEY_DIM + key_dims[:, None]
        key_mask = visible[None, :] & (key_dims[:, None] < KEY_DIM)
        k = tl.load(key_pages + key_offsets, mask=key_mask, other=0.0).to(q.dtype)
        scores = tl.dot(q, k, input_precision=PRECISION) * scale
        scores = tl.where(visible[None, :], scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))  # finite: each tile has a visible token
        weights = tl.exp2(scores - new_best[:, None])
        shrink = tl.exp2(best - new_best)
        total = total * shrink + tl.sum(weights, 1)
        value_offsets = (slot * NUM_KV_HEADS + kv_head)[:, None] * VALUE_DIM + value_dims[None, :]
        value_mask = visible[:, None] & (value_dims[None, :] < VALUE_DIM)
        v = tl.load(value_pages + value_offsets, mask=value_mask, other=0.0).to(q.dtype)
        summed = summed * shrink[:, None] + tl.dot(weights.to(q.dtype), v, input_precision=PRECISION)
        best = new_best

    divisor = tl.where(total > 0, total, 1.0)
    result = summed / divisor[:, None]
    if IS_FP8:
        result *= tl.load(value_scales + kv_head)
    head_index = row.to(tl.int64) * (NUM_KV_HEADS * GROUP) + heads
    out_mask = (groups[:, None] < GROUP) & (value_dims[None, :] < VALUE_DIM)
    places = output + head_index[:, None] * VALUE_DIM + value_dims[None, :]
    if num_busy <= 1:
        tl.store(places, result.to(output.dtype.element_ty), mask=out_mask)
    else:
        lse = best + tl.log2(divisor)
        part = head_index * num_splits
        tl.store(partial_lse + part + split, lse, mask=groups < GROUP)
        part_places = partial_output + part[:, None] * VALUE_DIM + value_dims[None, :]
        tl.store(part_places + split * VALUE_DIM, result, mask=out_mask)
        tl.debug_barrier()  # all of this program's stores come before its arrival
        arrival = arrivals + row * NUM_KV_HEADS + kv_head
        if tl.atomic_add(arrival, 1, sem="acq_rel") == num_busy - 1:
            tl.store(arrival, 0)  # for the next launch
            best = tl.full([BLOCK_GROUP], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK_GROUP], tl.float32)
            summed = tl.zeros([BLOCK_GROUP, BLOCK_VALUE], tl.float32)
            for other in range(num_busy):
                # .cg: what other multiprocessors wrote is in the L2 cache
                lse_place = partial_lse + part + other
                part_lse = tl.load(lse_place, mask=groups < GROUP, other=0.0, cache_modifier=".cg")
                part_place = part_places + other * VALUE_DIM
                values = tl.load(part_place, mask=out_mask, other=0.0, cache_modifier=".cg")
                new_best = tl.maximum(best, part_lse.to(tl.float32))
                shrink = tl.exp2(best - new_best)
                weight = tl.exp2(part_lse.to(tl.float32) - new_best)
                total = total * shrink + weight
                summed = summed * shrink[:, None] + values.to(tl.float32) * weight[:, None]
                best = new_best
            tl.store(places, (summed / total[:, None]).to(output.dtype.element_ty), mask=out_mask)


def split_count(num_rows: int, num_kv_heads: int) -> int:
    """Into how many parts, a power of two, a context is cut: fewer as the batch fills the GPU by itself."""
    wanted = -(-NUM_PROGRAMS_WANTED // (num_rows * num_kv_heads))
    return min(MAX_SPLITS, triton.next_power_of_2(wanted))


def fills_gpu(num_rows: int, num_kv_heads: int) -> bool:
    """Whether each multiprocessor has a program, though no context is cut."""
    return num_rows * num_kv_heads >= NUM_PROGRAMS_WANTED // 4


def decode_attention(
    query: torch.Tensor,  # [rows, num_heads, key_dim]
    key_pages: torch.Tensor,  # [blocks, block_size, num_kv_heads, key_dim]
    value_pages: torch.Tensor,  # [blocks, block_size, num_kv_heads, value_dim]
    tables: torch.Tensor,  # [table rows, blocks] int32
    table_rows: torch.Tensor,  # [rows] int64: each query row's row of `tables`
    context_lens: torch.Tensor,  # [rows] int64; 0 gives zeros
    scales: KVScales,
    scale: float,
    window: int | None,
    output: torch.Tensor,  # [rows, num_heads, value_dim], contiguous
    arrivals: torch.Tensor | None = None,  # [rows * num_kv_heads or more] int32, zeros before and after
    picked: PickedPages | None = None,
) -> None:
    """Attends the last token of each context to the tokens that its table names; fills `output`.

    A row with picked pages sees those in the place of its context, each KV head its own.
    """
    num_rows, num_heads, key_dim = query.shape
    _, block_size, num_kv_heads, value_dim = value_pages.shape
    num_splits = split_count(num_rows, num_kv_heads)
    rows = query if query.stride(2) == 1 else query.contiguous()
    shape = (num_rows, num_heads, num_splits if num_splits > 1 else 0)
    parts = torch.empty(*shape, value_dim, dtype=torch.float32, device=query.device)
    lse = torch.empty(shape, dtype=torch.float32, device=query.device)
    if arrivals is None or len(arrivals) < num_rows * num_kv_heads:
        arrivals = torch.zeros(num_rows * num_kv_heads, dtype=torch.int32, device=query.device)
    pdl = has_dependent_launch(query.device)
    is_wide = max(key_dim, value_dim) > 128 or query.dtype == torch.float32
    group = num_heads // num_kv_heads
    _decode_kernel[(num_rows, num_kv_heads, num_splits)](
        rows,
        key_pages,
        value_pages,
        tables,
        table_rows,
        context_lens,
        scales.key,
        scales.value,
        output,
        parts,
        lse,
        arrivals,
        tables if picked is None else picked.tables,
        context_lens if picked is None else picked.lens,
        scale * LOG2_E,
        window or 0,
        num_splits,
        MIN_TILES_IN_BATCH if fills_gpu(num_rows, num_kv_heads) else 1,
        tables.stride(0),
        0 if picked is None else picked.tables.stride(1),
        rows.stride(0),
        rows.stride(1),
        BLOCK_SIZE=block_size,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        BLOCK_GROUP=tile_side(group),
        KEY_DIM=key_dim,
        BLOCK_KEY=tile_side(key_dim),
        VALUE_DIM=value_dim,
        BLOCK_VALUE=tile_side(value_dim),
        BLOCK_TOKENS=32 if is_wide else 64,
        HAS_WINDOW=window is not None,
        HAS_PICKED=picked is not None,
        IS_FP8=key_pages.dtype == torch.float8_e4m3fn,
        PRECISION=dot_precision(query.dtype),
        PDL=pdl,
        launch_pdl=pdl,
        num_warps=4,
        num_stages=2,
    )
