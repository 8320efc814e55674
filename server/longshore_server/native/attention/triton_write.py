"""Writes the keys and values of a step's tokens to their places in the paged cache, in one kernel.

A cache in FP8 (e4m3) is written divided by its layer's scales. It attends nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from longshore_server.native.attention.kv_cache import KVScales

FP8_MAX: tl.constexpr = tl.constexpr(448.0)  # largest finite e4m3


@triton.jit
def _write_kernel(
    source,
    pages,
    slots,
    scales,
    source_stride_token,
    source_stride_head,
    NUM_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    IS_FP8: tl.constexpr,
):
    token = tl.program_id(0)
    slot = tl.load(slots + token)
    if slot >= 0:  # padding rows of a bucket have no place
        heads = tl.arange(0, BLOCK_HEADS)
        dims = tl.arange(0, BLOCK_DIM)
        mask = (heads[:, None] < NUM_HEADS) & (dims[None, :] < DIM)
        offsets = heads[:, None] * source_stride_head + dims[None, :]
        values = tl.load(source + token.to(tl.int64) * source_stride_token + offsets, mask=mask, other=0.0)
        if IS_FP8:
            scale = tl.load(scales + heads, mask=heads < NUM_HEADS, other=1.0)
            scaled = values.to(tl.float32) / scale[:, None]
            values = tl.minimum(tl.maximum(scaled, -FP8_MAX), FP8_MAX)
        place = pages + slot * (NUM_HEADS * DIM) + heads[:, None] * DIM + dims[None, :]
        tl.store(place, values.to(pages.dtype.element_ty), mask=mask)


def write_kv(
    key: torch.Tensor,  # [tokens, num_kv_heads, key_dim]
    value: torch.Tensor,  # [tokens, num_kv_heads, value_dim]
    key_pages: torch.Tensor,  # [blocks, block_size, num_kv_heads, key_dim]
    value_pages: torch.Tensor,
    slots: torch.Tensor,  # [tokens] int64, negative for none
    scales: KVScales,
) -> None:
    """Stores each token's key and value in its slot."""
    for source, pages, scale in ((key, key_pages, scales.key), (value, value_pages, scales.value)):
        num_tokens, num_heads, dim = source.shape
        rows = source if source.stride(2) == 1 else source.contiguous()
        _write_kernel[(num_tokens,)](
            rows,
            pages,
            slots,
            scale,
            rows.stride(0),
            rows.stride(1),
            NUM_HEADS=num_heads,
            DIM=dim,
            BLOCK_HEADS=triton.next_power_of_2(num_heads),
            BLOCK_DIM=triton.next_power_of_2(dim),
            IS_FP8=pages.dtype == torch.float8_e4m3fn,
        )
