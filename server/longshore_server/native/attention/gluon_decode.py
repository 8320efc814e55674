"""Decode attention from the qkv product, in Gluon for Hopper: it rotates, writes the cache and attends.

What a row's older tokens have in the cache was written in earlier steps, so a program begins to read it while
the product is still being computed; the newest key and value go from the product into the sums and need no
way through the cache. Imported on CUDA only.
"""

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mma_v2

from longshore_server.native.attention.interface import DecodeRows, QkvProduct
from longshore_server.native.attention.kv_cache import KVTarget
from longshore_server.native.attention.triton_decode import LOG2_E
from longshore_server.native.attention.triton_parts import NUM_FIELDS, TILE_TOKENS
from longshore_server.native.attention.triton_tiles import tile_side
from longshore_server.native.gpu.triton_overlap import wait_for_previous
from longshore_server.native.model.triton_rope import _load_halves

HEAD_DIMS = (64, 128)
MAX_GROUP = 16  # queries of one KV head: more than a tile of them take too many registers
TILES_BYTES = 64 * 1024  # of the tiles of keys and values that are under way
# Two programs on a multiprocessor: as many as fit would crowd those that the product leaves idle.
MULTIPROCESSOR_BYTES, NUM_RESIDENT = 228 * 1024, 2
NUM_WARPS = 4
LOWEST = gl.constexpr(-1e30)  # of a part that sees no token: finite, so that its weight is 0 and not NaN
GLUON_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@gluon.jit
def _rotated(
    x1, x2, weight, dims, cos1, cos2, sin1, sin2, eps,
    HALF: gl.constexpr, DTYPE: gl.constexpr, HAS_NORM: gl.constexpr, AXIS: gl.constexpr,
):  # fmt: skip
    """Both halves of heads, normed where there is a norm, and turned; a head's numbers lie along `AXIS`."""
    if HAS_NORM:
        inverse = gl.rsqrt((gl.sum(x1 * x1, AXIS) + gl.sum(x2 * x2, AXIS)) / (2 * HALF) + eps)
        if AXIS == 1:
            inverse = inverse[:, None]
        x1 = (x1 * inverse).to(DTYPE).to(gl.float32) * gl.load(weight + dims).to(gl.float32)
        x2 = (x2 * inverse).to(DTYPE).to(gl.float32) * gl.load(weight + HALF + dims).to(gl.float32)
        x1 = x1.to(DTYPE).to(gl.float32)
        x2 = x2.to(DTYPE).to(gl.float32)
    return (x1 * cos1 - x2 * sin1).to(DTYPE), (x2 * cos2 + x1 * sin2).to(DTYPE)


@gluon.jit
def _load_tile(
    key_pages, value_pages, table, first, end, low, kv_head, stage, k1, k2, v1, v2,
    NUM_KV_HEADS: gl.constexpr, PAGE: gl.constexpr,
):  # fmt: skip
    """Starts to load the tokens from `low` on, both halves of keys and values; zeros outside [first, end)."""
    TILE: gl.constexpr = k1.shape[1]
    HALF: gl.constexpr = k1.shape[2]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HALF, HALF // 8], [gl.num_warps(), 1], [1, 0])
    tokens = low + gl.arange(0, TILE, gl.SliceLayout(1, layout))
    dims = gl.arange(0, HALF, gl.SliceLayout(0, layout))
    is_there = (tokens >= first) & (tokens < end)
    pages = gl.load(table + tokens // PAGE, mask=is_there, other=0, cache_modifier=".cg").to(gl.int64)
    slots = pages * PAGE + tokens % PAGE
    places = ((slots * NUM_KV_HEADS + kv_head) * (2 * HALF))[:, None] + dims[None, :]
    mask = is_there[:, None] & (dims[None, :] >= 0)
    async_copy.async_copy_global_to_shared(k1.index(stage), key_pages + places, mask)
    async_copy.async_copy_global_to_shared(k2.index(stage), key_pages + places + HALF, mask)
    async_copy.async_copy_global_to_shared(v1.index(stage), value_pages + places, mask)
    async_copy.async_copy_global_to_shared(v2.index(stage), value_pages + places + HALF, mask)
    async_copy.commit_group()


# One form, whatever the numbers are and wherever they stand in a step's inputs.
@gluon.jit(
    do_not_specialize=["num_rows", "window", "table_stride"],
    do_not_specialize_on_alignment=["slots", "table_rows", "context_lens"],
)
def _product_decode_kernel(
    values, row_scales, channel_scales, bias, cos, sin, q_weight, k_weight,
    key_pages, value_pages, slots, tables, table_rows, context_lens, parts,
    output, partial_output, partial_lse, arrivals, num_rows, scale, window, eps, table_stride,
    NUM_KV_HEADS: gl.constexpr, GROUP: gl.constexpr, BLOCK_GROUP: gl.constexpr, HEAD_DIM: gl.constexpr,
    PAGE: gl.constexpr, TILE: gl.constexpr, NUM_FIELDS: gl.constexpr, DTYPE: gl.constexpr,
    HAS_SCALES: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_NORM: gl.constexpr, NUM_PARTS: gl.constexpr,
    HAS_WINDOW: gl.constexpr, NUM_STAGES: gl.constexpr, SPARE: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """One part of one row's context, for the queries of one KV head."""
    HALF: gl.constexpr = HEAD_DIM // 2
    NUM_HEADS: gl.constexpr = NUM_KV_HEADS * GROUP
    number = gl.program_id(0)
    kv_head = gl.program_id(1)
    # Before the wait nothing is read that the step's kernels write, the rotary angles neither: any of them
    # may still run. And nothing from the L1 cache (hence .cg), which may hold what the step before had there.
    part = parts + number * NUM_FIELDS
    row = gl.load(part, cache_modifier=".cg")
    low = gl.load(part + 1, cache_modifier=".cg")
    end_tile = gl.load(part + 2, cache_modifier=".cg")
    first_part = gl.load(part + 3, cache_modifier=".cg")
    row_parts = gl.load(part + 4, cache_modifier=".cg")
    if row >= 0:
        context = gl.load(context_lens + row, cache_modifier=".cg").to(gl.int32)
        table_row = gl.load(table_rows + row, cache_modifier=".cg")
        table = tables + table_row.to(gl.int64) * table_stride
        first = 0
        if HAS_WINDOW:
            first = gl.maximum(context - window, 0)
            low = gl.maximum(low, first // TILE)
        num_tiles = end_tile - low
        end = gl.minimum(end_tile * TILE, context - 1)
        shared: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
        k1_tiles = gl.allocate_shared_memory(DTYPE, [NUM_STAGES, TILE, HALF], shared)
        k2_tiles = gl.allocate_shared_memory(DTYPE, [NUM_STAGES, TILE, HALF], shared)
        v1_tiles = gl.allocate_shared_memory(DTYPE, [NUM_STAGES, TILE, HALF], shared)
        v2_tiles = gl.allocate_shared_memory(DTYPE, [NUM_STAGES, TILE, HALF], shared)
        spare = gl.allocate_shared_memory(DTYPE, [SPARE, HALF], shared)  # see NUM_RESIDENT
        for early in gl.static_range(NUM_STAGES):
            _load_tile(
                key_pages, value_pages, table, first, end, (low + early) * TILE, kv_head, early,
                k1_tiles, k2_tiles, v1_tiles, v2_tiles, NUM_KV_HEADS, PAGE,
            )  # fmt: skip
        mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, num_warps], [16, 8])
        left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
        right: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
        heads: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HALF, HALF // 8], [num_warps, 1], [1, 0])
        members = gl.arange(0, BLOCK_GROUP, gl.SliceLayout(1, heads))[:, None]
        dims = gl.arange(0, HALF, gl.SliceLayout(0, heads))
        slot = gl.load(slots + row, cache_modifier=".cg")

        wait_for_previous(True)
        angle = row.to(gl.int64) * HEAD_DIM + dims
        cos1 = gl.load(cos + angle).to(gl.float32)
        cos2 = gl.load(cos + angle + HALF).to(gl.float32)
        sin1 = gl.load(sin + angle).to(gl.float32)
        sin2 = gl.load(sin + angle + HALF).to(gl.float32)
        width: gl.constexpr = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
        product = values + row.to(gl.int64) * width
        part_stride = num_rows.to(gl.int64) * width
        row_scale = 1.0
        if HAS_SCALES:
            row_scale = gl.load(row_scales + row)
        q_channels = (kv_head * GROUP + members) * HEAD_DIM + dims[None, :]
        q_mask = (members < GROUP) & (dims[None, :] >= 0)
        q1, q2 = _load_halves(
            product, row_scale, channel_scales, bias, q_channels, q_mask, part_stride,
            HALF, DTYPE, HAS_SCALES, HAS_BIAS, NUM_PARTS,
        )  # fmt: skip
        k_channels = (NUM_HEADS + kv_head) * HEAD_DIM + dims
        k1, k2 = _load_halves(
            product, row_scale, channel_scales, bias, k_channels, dims >= 0, part_stride,
            HALF, DTYPE, HAS_SCALES, HAS_BIAS, NUM_PARTS,
        )  # fmt: skip
        sum_dims = gl.arange(0, HALF, gl.SliceLayout(0, mma))
        v_channels = (NUM_HEADS + NUM_KV_HEADS + kv_head) * HEAD_DIM + sum_dims
        v1, v2 = _load_halves(
            product, row_scale, channel_scales, bias, v_channels, sum_dims >= 0, part_stride,
            HALF, DTYPE, HAS_SCALES, HAS_BIAS, NUM_PARTS,
        )  # fmt: skip
        q1, q2 = _rotated(
            q1, q2, q_weight, dims[None, :], cos1[None, :], cos2[None, :], sin1[None, :], sin2[None, :], eps,
            HALF, DTYPE, HAS_NORM, 1,
        )  # fmt: skip
        k1, k2 = _rotated(k1, k2, k_weight, dims, cos1, cos2, sin1, sin2, eps, HALF, DTYPE, HAS_NORM, 0)

        # A row's last part has its newest token, which begins the sums.
        has_newest = (number == first_part + row_parts - 1) & (context > 0)
        if has_newest & (slot >= 0):  # padding rows of a bucket have no place
            place = (slot * NUM_KV_HEADS + kv_head) * HEAD_DIM
            gl.store(key_pages + place + dims, k1)
            gl.store(key_pages + place + HALF + dims, k2)
            gl.store(value_pages + place + sum_dims, v1.to(DTYPE))
            gl.store(value_pages + place + HALF + sum_dims, v2.to(DTYPE))
        newest = gl.sum(q1.to(gl.float32) * k1.to(gl.float32)[None, :], 1)
        newest += gl.sum(q2.to(gl.float32) * k2.to(gl.float32)[None, :], 1)
        newest = gl.convert_layout(newest * scale, gl.SliceLayout(1, mma))
        best = gl.where(has_newest, newest, LOWEST)
        zeros = gl.zeros([BLOCK_GROUP, HALF], gl.float32, mma)
        sum1 = gl.where(has_newest, zeros + v1[None, :], 0.0)
        sum2 = gl.where(has_newest, zeros + v2[None, :], 0.0)
        query1 = gl.convert_layout(q1, left)
        query2 = gl.convert_layout(q2, left)
        columns = gl.arange(0, TILE, gl.SliceLayout(0, mma))[None, :]
        weight_sums = gl.zeros([BLOCK_GROUP, TILE], gl.float32, mma)  # added up once: that takes other warps
        for index in range(num_tiles):
            stage = index % NUM_STAGES
            async_copy.wait_group(NUM_STAGES - 1)
            scores = gl.zeros([BLOCK_GROUP, TILE], gl.float32, mma)
            scores = mma_v2(query1, k1_tiles.index(stage).permute((1, 0)).load(right), scores)
            scores = mma_v2(query2, k2_tiles.index(stage).permute((1, 0)).load(right), scores)
            tokens = (low + index) * TILE + columns
            scores = gl.where((tokens >= first) & (tokens < end), scores * scale, float("-inf"))
            new_best = gl.maximum(best, gl.max(scores, 1))
            weights = gl.exp2(scores - new_best[:, None])
            shrink = gl.exp2(best - new_best)[:, None]
            weight_sums = weight_sums * shrink + weights
            weights = gl.convert_layout(weights.to(DTYPE), left)
            sum1 = mma_v2(weights, v1_tiles.index(stage).load(right), sum1 * shrink)
            sum2 = mma_v2(weights, v2_tiles.index(stage).load(right), sum2 * shrink)
            best = new_best
            _load_tile(
                key_pages, value_pages, table, first, end, (low + index + NUM_STAGES) * TILE, kv_head, stage,
                k1_tiles, k2_tiles, v1_tiles, v2_tiles, NUM_KV_HEADS, PAGE,
            )  # fmt: skip

        spare._keep_alive()
        total = gl.sum(weight_sums, 1) + gl.where(has_newest, gl.exp2(newest - best), 0.0)
        total = gl.where(total > 0, total, 1.0)
        sum1 = sum1 / total[:, None]
        sum2 = sum2 / total[:, None]
        sum_rows = gl.arange(0, BLOCK_GROUP, gl.SliceLayout(1, mma))
        mask = (sum_rows < GROUP)[:, None] & (sum_dims[None, :] >= 0)
        places = (kv_head * GROUP + sum_rows)[:, None] * HEAD_DIM + sum_dims[None, :]
        row_output = output + row.to(gl.int64) * (NUM_HEADS * HEAD_DIM)
        if row_parts == 1:
            gl.store(row_output + places, sum1.to(DTYPE), mask=mask)
            gl.store(row_output + places + HALF, sum2.to(DTYPE), mask=mask)
        else:
            lse_places = partial_lse + kv_head * GROUP + sum_rows
            mine = number.to(gl.int64) * NUM_HEADS
            gl.store(lse_places + mine, best + gl.log2(total), mask=sum_rows < GROUP)
            gl.store(partial_output + mine * HEAD_DIM + places, sum1, mask=mask)
            gl.store(partial_output + mine * HEAD_DIM + places + HALF, sum2, mask=mask)
            gl.thread_barrier()  # all of this program's stores come before its arrival
            arrival = arrivals + row * NUM_KV_HEADS + kv_head
            if gl.atomic_add(arrival, 1, sem="acq_rel") == row_parts - 1:
                gl.store(arrival, 0)  # for the next launch
                highest = gl.full([BLOCK_GROUP], LOWEST, gl.float32, gl.SliceLayout(1, mma))
                whole = gl.zeros([BLOCK_GROUP], gl.float32, gl.SliceLayout(1, mma))
                all1 = zeros
                all2 = zeros
                for other in range(first_part, first_part + row_parts):
                    # .cg: what other multiprocessors wrote is in the L2 cache
                    theirs = gl.to_tensor(other).to(gl.int64) * NUM_HEADS
                    lse = gl.load(lse_places + theirs, mask=sum_rows < GROUP, other=0.0, cache_modifier=".cg")
                    from1 = partial_output + theirs * HEAD_DIM + places
                    part1 = gl.load(from1, mask=mask, other=0.0, cache_modifier=".cg")
                    part2 = gl.load(from1 + HALF, mask=mask, other=0.0, cache_modifier=".cg")
                    higher = gl.maximum(highest, lse)
                    less = gl.exp2(highest - higher)
                    weight = gl.exp2(lse - higher)
                    whole = whole * less + weight
                    all1 = all1 * less[:, None] + part1 * weight[:, None]
                    all2 = all2 * less[:, None] + part2 * weight[:, None]
                    highest = higher
                gl.store(row_output + places, (all1 / whole[:, None]).to(DTYPE), mask=mask)
                gl.store(row_output + places + HALF, (all2 / whole[:, None]).to(DTYPE), mask=mask)


def can_attend(target: KVTarget, dtype: torch.dtype, num_heads: int) -> bool:
    """Whether attend_product() takes queries of this type and number over this cache."""
    key_dim, value_dim = target.keys.shape[3], target.values.shape[3]
    return (
        dtype in GLUON_DTYPES
        and target.keys.dtype == target.values.dtype == dtype
        and key_dim == value_dim
        and key_dim in HEAD_DIMS
        and num_heads // target.keys.shape[2] <= MAX_GROUP
    )


def attend_product(
    product: QkvProduct,
    target: KVTarget,
    tables: torch.Tensor,  # [table rows, blocks] int32
    rows: DecodeRows,  # as many as the product has
    parts: torch.Tensor,  # from cut_contexts(rows.context_lens)
    scale: float,
    window: int | None,
    arrivals: torch.Tensor,  # [rows * num_kv_heads or more] int32, zeros before and after
) -> torch.Tensor:
    """[rows, num_heads, head_dim]; keys and values of the rows are in `target` then, and zeros of no context.

    Product and angles are read when the kernel before is through. All else must be older than the step's
    kernels that launch their dependents early: it may be read while any of those runs.
    """
    x, num_heads, num_kv_heads = product.channels, product.num_heads, product.num_kv_heads
    num_rows, head_dim = len(product.cos), target.keys.shape[3]
    output = product.cos.new_empty(num_rows, num_heads, head_dim)
    num_parts = len(parts)
    partial_output = torch.empty(num_parts, num_heads, head_dim, dtype=torch.float32, device=output.device)
    partial_lse = torch.empty(num_parts, num_heads, dtype=torch.float32, device=output.device)
    q_weight, k_weight, eps = (output, output, 0.0) if product.norms is None else product.norms
    optional = (x.row_scales, x.channel_scales, x.bias)
    group = num_heads // num_kv_heads
    num_stages, spare = _shared_memory(head_dim, output.element_size())
    _product_decode_kernel[(num_parts, num_kv_heads)](
        x.values, *(x.values if each is None else each for each in optional), product.cos, product.sin,
        q_weight, k_weight, target.keys, target.values, target.slots, tables, rows.table_rows,
        rows.context_lens, parts, output, partial_output, partial_lse, arrivals,
        num_rows, scale * LOG2_E, window or 0, eps, tables.stride(0),
        NUM_KV_HEADS=num_kv_heads, GROUP=group, BLOCK_GROUP=tile_side(group), HEAD_DIM=head_dim,
        PAGE=target.keys.shape[1], TILE=TILE_TOKENS, NUM_FIELDS=NUM_FIELDS, DTYPE=GLUON_DTYPES[output.dtype],
        HAS_SCALES=x.row_scales is not None, HAS_BIAS=x.bias is not None, HAS_NORM=product.norms is not None,
        NUM_PARTS=x.num_parts, HAS_WINDOW=window is not None, NUM_STAGES=num_stages,
        SPARE=spare, launch_pdl=True, num_warps=NUM_WARPS,
    )  # fmt: skip
    return output


def _shared_memory(head_dim: int, num_bytes: int) -> tuple[int, int]:
    """Tiles under way, and rows of half a head to hold free; `num_bytes` are those of a number."""
    num_stages = TILES_BYTES // (2 * TILE_TOKENS * head_dim * num_bytes)
    free_bytes = MULTIPROCESSOR_BYTES // (NUM_RESIDENT + 1) - TILES_BYTES
    return num_stages, triton.next_power_of_2(free_bytes // (head_dim // 2 * num_bytes))
