"""Triton kernels of the rotary embedding: its angles, once a step, and what follows the merged qkv product.

That is scales, bias, q/k norm and the rotation; it also puts keys and values into the paged cache where it is
told to. References and shapes stand in fused_ops.py. Imported on CUDA only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from longshore_server.native.attention.kv_cache import KVTarget
from longshore_server.native.gpu.triton_overlap import has_dependent_launch, wait_for_previous
from longshore_server.native.model.fp8 import FP8_DTYPE, FP8_MAX, ScaledOutput
from longshore_server.native.model.triton_rows import TRITON_DTYPES, _load_sum, _pointers

LARGEST: tl.constexpr = tl.constexpr(FP8_MAX)

HEADS_PER_PROGRAM = 8


@triton.jit
def _angles_kernel(
    positions, inverse_frequencies, cos, sin, scaling,
    HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, BLOCK_HALF)
    mask = dims < HALF
    frequencies = tl.load(inverse_frequencies + dims, mask=mask, other=0.0).to(tl.float32)
    wait_for_previous(PDL)
    angles = tl.load(positions + token).to(tl.float32) * frequencies
    cosines = (tl.cos(angles) * scaling).to(cos.dtype.element_ty)
    sines = (tl.sin(angles) * scaling).to(sin.dtype.element_ty)
    place = token * (2 * HALF) + dims
    for half in tl.static_range(2):
        tl.store(cos + place + half * HALF, cosines, mask=mask)
        tl.store(sin + place + half * HALF, sines, mask=mask)


@triton.jit
def _load_half(
    values, row_scale, channel_scales, bias, offsets, mask, part_stride,
    DTYPE: tl.constexpr, HAS_SCALES: tl.constexpr, HAS_BIAS: tl.constexpr, NUM_PARTS: tl.constexpr,
):  # fmt: skip
    x = _load_sum(values + offsets, mask, part_stride, NUM_PARTS)
    if HAS_SCALES:
        x = x * row_scale * tl.load(channel_scales + offsets, mask=mask, other=0.0)
    if HAS_BIAS:
        x += tl.load(bias + offsets, mask=mask, other=0.0).to(tl.float32)
    return x.to(DTYPE).to(tl.float32)


@triton.jit
def _load_halves(
    values, row_scale, channel_scales, bias, offsets, mask, part_stride,
    HALF: tl.constexpr, DTYPE: tl.constexpr, HAS_SCALES: tl.constexpr, HAS_BIAS: tl.constexpr,
    NUM_PARTS: tl.constexpr,
):  # fmt: skip
    """Both halves of heads of the product, rounded to DTYPE, in float32; `offsets` are those of the lower."""
    lower = _load_half(
        values, row_scale, channel_scales, bias, offsets, mask, part_stride,
        DTYPE, HAS_SCALES, HAS_BIAS, NUM_PARTS,
    )  # fmt: skip
    upper = _load_half(
        values, row_scale, channel_scales, bias, offsets + HALF, mask, part_stride,
        DTYPE, HAS_SCALES, HAS_BIAS, NUM_PARTS,
    )  # fmt: skip
    return lower, upper


@triton.jit
def _store_halves(place, scale, lower, upper, mask, HALF: tl.constexpr, IS_FP8: tl.constexpr):
    """Both halves of cached heads, in an FP8 cache divided by each head's scale."""
    if IS_FP8:
        lower = tl.minimum(tl.maximum(lower.to(tl.float32) / scale, -LARGEST), LARGEST)
        upper = tl.minimum(tl.maximum(upper.to(tl.float32) / scale, -LARGEST), LARGEST)
    tl.store(place, lower.to(place.dtype.element_ty), mask=mask)
    tl.store(place + HALF, upper.to(place.dtype.element_ty), mask=mask)


@triton.jit
def _qkv_kernel(
    values, row_scales, channel_scales, bias, cos, sin, q_weight, k_weight, query, key, value,
    key_pages, value_pages, key_scales, value_scales, slots, eps,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    DTYPE: tl.constexpr, HAS_SCALES: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr,
    TO_PAGES: tl.constexpr, TO_ROWS: tl.constexpr, IS_FP8: tl.constexpr, NUM_PARTS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    wait_for_previous(PDL)
    heads = (tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS))[:, None]
    dims = tl.arange(0, BLOCK_HALF)[None, :]
    HALF: tl.constexpr = HEAD_DIM // 2
    is_query = heads < NUM_HEADS
    is_value = heads >= NUM_HEADS + NUM_KV_HEADS
    mask = (heads < NUM_HEADS + 2 * NUM_KV_HEADS) & (dims < HALF)
    lower = heads * HEAD_DIM + dims
    width: tl.constexpr = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
    row = values + token * width
    part_stride = tl.num_programs(0) * width
    row_scale = 1.0
    if HAS_SCALES:
        row_scale = tl.load(row_scales + token)
    x1, x2 = _load_halves(
        row, row_scale, channel_scales, bias, lower, mask, part_stride,
        HALF, DTYPE, HAS_SCALES, HAS_BIAS, NUM_PARTS,
    )  # fmt: skip
    if HAS_NORM:
        mean_square = (tl.sum(x1 * x1, axis=1) + tl.sum(x2 * x2, axis=1))[:, None] / HEAD_DIM
        inverse = tl.rsqrt(mean_square + eps)
        zeros = heads * 0
        q1 = tl.load(q_weight + zeros + dims, mask=mask & is_query, other=0.0).to(tl.float32)
        q2 = tl.load(q_weight + zeros + dims + HALF, mask=mask & is_query, other=0.0).to(tl.float32)
        k1 = tl.load(k_weight + zeros + dims, mask=mask & ~is_query, other=0.0).to(tl.float32)
        k2 = tl.load(k_weight + zeros + dims + HALF, mask=mask & ~is_query, other=0.0).to(tl.float32)
        n1 = ((x1 * inverse).to(DTYPE).to(tl.float32) * (q1 + k1)).to(DTYPE).to(tl.float32)
        n2 = ((x2 * inverse).to(DTYPE).to(tl.float32) * (q2 + k2)).to(DTYPE).to(tl.float32)
        x1 = tl.where(is_value, x1, n1)
        x2 = tl.where(is_value, x2, n2)
    angle = token * HEAD_DIM + dims
    half_mask = dims < HALF
    cos1 = tl.load(cos + angle, mask=half_mask, other=0.0).to(tl.float32)
    cos2 = tl.load(cos + angle + HALF, mask=half_mask, other=0.0).to(tl.float32)
    sin1 = tl.load(sin + angle, mask=half_mask, other=0.0).to(tl.float32)
    sin2 = tl.load(sin + angle + HALF, mask=half_mask, other=0.0).to(tl.float32)
    y1 = tl.where(is_value, x1, x1 * cos1 - x2 * sin1).to(DTYPE)
    y2 = tl.where(is_value, x2, x2 * cos2 + x1 * sin2).to(DTYPE)
    q_place = query + token * (NUM_HEADS * HEAD_DIM) + lower
    tl.store(q_place, y1, mask=mask & is_query)
    tl.store(q_place + HALF, y2, mask=mask & is_query)
    k_mask = mask & ~is_query & ~is_value
    v_mask = mask & is_value
    k_head = heads - NUM_HEADS
    v_head = k_head - NUM_KV_HEADS
    row_size: tl.constexpr = NUM_KV_HEADS * HEAD_DIM
    if TO_ROWS:
        k_place = key + token * row_size + k_head * HEAD_DIM + dims
        tl.store(k_place, y1, mask=k_mask)
        tl.store(k_place + HALF, y2, mask=k_mask)
        v_place = value + token * row_size + v_head * HEAD_DIM + dims
        tl.store(v_place, y1, mask=v_mask)
        tl.store(v_place + HALF, y2, mask=v_mask)
    if TO_PAGES:
        slot = tl.load(slots + token)
        if slot >= 0:  # padding rows of a bucket have no place
            k_scale, v_scale = 1.0, 1.0
            if IS_FP8:
                is_k = (heads >= NUM_HEADS) & (heads < NUM_HEADS + NUM_KV_HEADS)
                is_v = is_value & (heads < NUM_HEADS + 2 * NUM_KV_HEADS)
                k_scale = tl.load(key_scales + k_head, mask=is_k, other=1.0)
                v_scale = tl.load(value_scales + v_head, mask=is_v, other=1.0)
            k_slot = key_pages + slot * row_size + k_head * HEAD_DIM + dims
            _store_halves(k_slot, k_scale, y1, y2, k_mask, HALF, IS_FP8)
            v_slot = value_pages + slot * row_size + v_head * HEAD_DIM + dims
            _store_halves(v_slot, v_scale, y1, y2, v_mask, HALF, IS_FP8)


def rotary_angles(
    positions: torch.Tensor, inverse_frequencies: torch.Tensor, scaling: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    half = len(inverse_frequencies)
    cos = torch.empty(len(positions), 2 * half, dtype=dtype, device=positions.device)
    sin = torch.empty_like(cos)
    pdl = has_dependent_launch(positions.device)
    _angles_kernel[(len(positions),)](
        positions, inverse_frequencies, cos, sin, scaling,
        HALF=half, BLOCK_HALF=triton.next_power_of_2(half), PDL=pdl, launch_pdl=pdl, num_warps=1,
    )  # fmt: skip
    return cos, sin


def split_qkv(
    x: ScaledOutput,
    cos: torch.Tensor,
    sin: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    norms: tuple[torch.Tensor, torch.Tensor, float] | None,
    target: KVTarget | None = None,
    keep_rows: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    num_tokens, num_channels = x.values.shape[-2:]
    num_all = num_heads + 2 * num_kv_heads
    head_dim, dtype, device = num_channels // num_all, cos.dtype, x.values.device
    query = torch.empty(num_tokens, num_heads, head_dim, dtype=dtype, device=device)
    key = query.new_empty(num_tokens if keep_rows else 0, num_kv_heads, head_dim)
    value = torch.empty_like(key)
    q_weight, k_weight, eps = (query, query, 0.0) if norms is None else norms
    if target is None:
        pages = (query, query, query, query, query)
    else:
        pages = (target.keys, target.values, target.scales.key, target.scales.value, target.slots)
    num_groups = triton.cdiv(num_all, HEADS_PER_PROGRAM)
    pdl = has_dependent_launch(device)
    _qkv_kernel[(num_tokens, num_groups)](
        *_pointers(x), cos, sin, q_weight, k_weight, query, key if keep_rows else query,
        value if keep_rows else query, *pages, eps,
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, DTYPE=TRITON_DTYPES[dtype],
        HAS_SCALES=x.row_scales is not None, HAS_BIAS=x.bias is not None, HAS_NORM=norms is not None,
        TO_PAGES=target is not None, TO_ROWS=keep_rows, IS_FP8=pages[0].dtype == FP8_DTYPE,
        NUM_PARTS=x.num_parts, BLOCK_HEADS=HEADS_PER_PROGRAM,
        BLOCK_HALF=triton.next_power_of_2(head_dim // 2), PDL=pdl, launch_pdl=pdl, num_warps=4,
    )  # fmt: skip
    return query, key, value
