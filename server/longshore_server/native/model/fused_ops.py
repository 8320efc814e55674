"""The operations between a decoder layer's matrix products, fused: on CUDA one Triton kernel each.

Each has its reference here in plain torch, which is the CPU path and the oracle of the kernel. Both round to
the model's dtype where the modules of transformers do, so fused and plain models agree.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch.nn.functional import silu

from longshore_server.native.attention.kv_cache import KVTarget, to_fp8
from longshore_server.native.model import fp8
from longshore_server.native.model.fp8 import Fp8Rows, ScaledOutput

# What a fused operation hands to the next matrix product: plain rows, or FP8 ones where that product is FP8.
Rows: TypeAlias = torch.Tensor | Fp8Rows


def add_rms_norm(
    x: ScaledOutput,  # [tokens, hidden]
    residual: torch.Tensor | None,  # [tokens, hidden]; None for the first norm of a model
    weight: torch.Tensor,  # [hidden]
    eps: float,
    to_fp8: bool,
) -> tuple[Rows, torch.Tensor]:
    """The normed sum of both, and the sum itself, which is the next residual."""
    if x.values.is_cuda:
        from longshore_server.native.model import triton_rows

        return triton_rows.add_rms_norm(x, residual, weight, eps, to_fp8)
    total = x.resolve(weight.dtype)
    if residual is not None:
        total = residual + total
    floats = total.float()
    normed = floats * torch.rsqrt(floats.pow(2).mean(-1, keepdim=True) + eps)
    output = weight * normed.to(weight.dtype)
    return (fp8.quantize_rows(output) if to_fp8 else output), total


def silu_mul(x: ScaledOutput, dtype: torch.dtype, to_fp8: bool) -> Rows:
    """[tokens, 2 * inner], gates before ups, to [tokens, inner]: silu(gate) * up."""
    if x.values.is_cuda:
        from longshore_server.native.model import triton_rows

        return triton_rows.silu_mul(x, dtype, to_fp8)
    gate, up = x.resolve(dtype).chunk(2, dim=-1)
    output = silu(gate) * up
    return fp8.quantize_rows(output) if to_fp8 else output


def quantize_rows(matrix: torch.Tensor) -> Fp8Rows:
    """Each row of [tokens, channels] by its own largest magnitude."""
    if matrix.is_cuda:
        from longshore_server.native.model import triton_rows

        return triton_rows.quantize_rows(matrix)
    return fp8.quantize_rows(matrix)


def rotary_angles(
    positions: torch.Tensor,  # [tokens]
    inverse_frequencies: torch.Tensor,  # [head_dim / 2]
    scaling: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [tokens, head_dim] of the angle of each pair of dimensions, times `scaling`."""
    if positions.is_cuda:
        from longshore_server.native.model import triton_rope

        return triton_rope.rotary_angles(positions, inverse_frequencies, scaling, dtype)
    angles = (positions.float()[:, None] * inverse_frequencies.float()).repeat(1, 2)
    return (angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype)


def split_qkv(
    x: ScaledOutput,  # [tokens, (num_heads + 2 * num_kv_heads) * head_dim]
    cos: torch.Tensor,  # [tokens, head_dim]
    sin: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    norms: tuple[torch.Tensor, torch.Tensor, float] | None,  # q and k weight [head_dim], eps
    *,
    target: KVTarget | None = None,  # keys and values go there as well
    keep_rows: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value [tokens, heads, head_dim]; query and key normed and rotated, in cos's dtype.

    Without `keep_rows` key and value come back empty; `target` has them then.
    """
    if x.values.is_cuda:
        from longshore_server.native.model import triton_rope

        return triton_rope.split_qkv(x, cos, sin, num_heads, num_kv_heads, norms, target, keep_rows)
    heads = x.resolve(cos.dtype).unflatten(1, (num_heads + 2 * num_kv_heads, -1))
    query, key, value = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    if norms is not None:
        query = _rms_norm(query, norms[0], norms[2])
        key = _rms_norm(key, norms[1], norms[2])
    query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
    if target is not None:
        _write(key, target.keys, target.scales.key, target.slots)
        _write(value, target.values, target.scales.value, target.slots)
    return (query, key, value) if keep_rows else (query, key[:0], value[:0])


def _write(rows: torch.Tensor, pages: torch.Tensor, scales: torch.Tensor, slots: torch.Tensor) -> None:
    """Rows [tokens, heads, dim] to their slots, in an FP8 cache divided by each head's scale."""
    if pages.dtype == fp8.FP8_DTYPE:
        rows = to_fp8(rows, scales)
    has_slot = slots >= 0
    flat = pages.view(-1, *pages.shape[2:])
    flat[slots[has_slot]] = rows[has_slot].to(pages.dtype)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    floats = x.float()
    normed = floats * torch.rsqrt(floats.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The half-and-half rotation of Llama's published code."""
    lower, upper = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-upper, lower), dim=-1) * sin[:, None]
