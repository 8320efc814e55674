"""Triton kernels over whole rows: add + RMSNorm, SiLU-and-multiply, and FP8 quantization of what they give.

One program per row, the row in registers. References and shapes stand in fused_ops.py. Imported on CUDA only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from longshore_server.native.model.fp8 import FP8_DTYPE, Fp8Rows, ScaledOutput

FP8_MAX: tl.constexpr = tl.constexpr(448.0)
MIN_AMAX: tl.constexpr = tl.constexpr(1e-12)


@triton.jit
def _store_row(row, offsets, mask, y, output, output_scales, width, TO_FP8: tl.constexpr):
    """Stores y, rounded to the output's type, or to FP8 by the row's largest magnitude."""
    place = output + row.to(tl.int64) * width + offsets
    if TO_FP8:
        scale = tl.maximum(tl.max(tl.abs(y), axis=0), MIN_AMAX) / FP8_MAX
        scaled = tl.minimum(tl.maximum(y / scale, -FP8_MAX), FP8_MAX)
        tl.store(place, scaled.to(tl.float8e4nv), mask=mask)
        tl.store(output_scales + row, scale)
    else:
        tl.store(place, y.to(output.dtype.element_ty), mask=mask)


@triton.jit
def _load_channels(
    values, row_scales, channel_scales, bias, row, offsets, mask, stride,
    HAS_SCALES: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Channels `offsets` of one row of a ScaledOutput, in float32."""
    x = tl.load(values + row.to(tl.int64) * stride + offsets, mask=mask, other=0.0).to(tl.float32)
    if HAS_SCALES:
        x = x * tl.load(row_scales + row) * tl.load(channel_scales + offsets, mask=mask, other=0.0)
    if HAS_BIAS:
        x += tl.load(bias + offsets, mask=mask, other=0.0).to(tl.float32)
    return x


@triton.jit
def _add_rms_norm_kernel(
    values, row_scales, channel_scales, bias, residual, weight, new_residual, output, output_scales,
    width, eps,
    HAS_SCALES: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, TO_FP8: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < width
    x = _load_channels(
        values, row_scales, channel_scales, bias, row, offsets, mask, width, HAS_SCALES, HAS_BIAS
    )
    stored = weight.dtype.element_ty
    place = row.to(tl.int64) * width + offsets
    if HAS_RESIDUAL:
        x = x.to(stored).to(tl.float32) + tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
        x = x.to(stored).to(tl.float32)
        tl.store(new_residual + place, x.to(stored), mask=mask)
    mean_square = tl.sum(x * x, axis=0) / width
    normed = (x * tl.rsqrt(mean_square + eps)).to(stored).to(tl.float32)
    y = normed * tl.load(weight + offsets, mask=mask, other=0.0).to(tl.float32)
    _store_row(row, offsets, mask, y.to(stored).to(tl.float32), output, output_scales, width, TO_FP8)


@triton.jit
def _silu_mul_kernel(
    values, row_scales, channel_scales, bias, output, output_scales, width,
    DTYPE: tl.constexpr, HAS_SCALES: tl.constexpr, HAS_BIAS: tl.constexpr, TO_FP8: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < width
    gate = _load_channels(
        values, row_scales, channel_scales, bias, row, offsets, mask, 2 * width, HAS_SCALES, HAS_BIAS
    )
    up = _load_channels(
        values + width, row_scales, channel_scales + width, bias + width, row, offsets, mask, 2 * width,
        HAS_SCALES, HAS_BIAS,
    )  # fmt: skip
    gate = gate.to(DTYPE).to(tl.float32)
    active = (gate / (1.0 + tl.exp(-gate))).to(DTYPE).to(tl.float32)
    y = (active * up.to(DTYPE).to(tl.float32)).to(DTYPE).to(tl.float32)
    _store_row(row, offsets, mask, y, output, output_scales, width, TO_FP8)


@triton.jit
def _quantize_kernel(matrix, output, output_scales, width, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < width
    y = tl.load(matrix + row.to(tl.int64) * stride + offsets, mask=mask, other=0.0).to(tl.float32)
    _store_row(row, offsets, mask, y, output, output_scales, width, True)


TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
SILU_BLOCK = 1024  # channels per program where no whole row is needed


def add_rms_norm(
    x: ScaledOutput, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, to_fp8: bool
) -> tuple[torch.Tensor | Fp8Rows, torch.Tensor]:
    num_rows, width = x.values.shape
    output, scales = _output(num_rows, width, weight.dtype, x.values.device, to_fp8)
    new_residual = x.values if residual is None else torch.empty_like(residual)
    _add_rms_norm_kernel[(num_rows,)](
        *_pointers(x), residual, weight, new_residual, output, scales, width, eps,
        HAS_SCALES=x.row_scales is not None, HAS_BIAS=x.bias is not None,
        HAS_RESIDUAL=residual is not None, TO_FP8=to_fp8,
        BLOCK=triton.next_power_of_2(width), num_warps=_num_warps(width),
    )  # fmt: skip
    return (Fp8Rows(output, scales) if to_fp8 else output), new_residual


def silu_mul(x: ScaledOutput, dtype: torch.dtype, to_fp8: bool) -> torch.Tensor | Fp8Rows:
    num_rows, width = x.values.shape[0], x.values.shape[1] // 2
    output, scales = _output(num_rows, width, dtype, x.values.device, to_fp8)
    block = triton.next_power_of_2(width) if to_fp8 else SILU_BLOCK
    _silu_mul_kernel[(num_rows, triton.cdiv(width, block))](
        *_pointers(x), output, scales, width, DTYPE=TRITON_DTYPES[dtype],
        HAS_SCALES=x.row_scales is not None, HAS_BIAS=x.bias is not None, TO_FP8=to_fp8,
        BLOCK=block, num_warps=_num_warps(block),
    )  # fmt: skip
    return Fp8Rows(output, scales) if to_fp8 else output


def quantize_rows(matrix: torch.Tensor) -> Fp8Rows:
    num_rows, width = matrix.shape
    output, scales = _output(num_rows, width, matrix.dtype, matrix.device, True)
    _quantize_kernel[(num_rows,)](
        matrix, output, scales, width, matrix.stride(0),
        BLOCK=triton.next_power_of_2(width), num_warps=_num_warps(width),
    )  # fmt: skip
    return Fp8Rows(output, scales)


def _output(
    num_rows: int, width: int, dtype: torch.dtype, device: torch.device, to_fp8: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    output = torch.empty(num_rows, width, dtype=FP8_DTYPE if to_fp8 else dtype, device=device)
    return output, torch.empty(num_rows if to_fp8 else 1, dtype=torch.float32, device=device)


def _pointers(x: ScaledOutput) -> tuple[torch.Tensor, ...]:
    """Every pointer is a tensor, for what is not there the values, which the kernel then leaves alone."""
    optional = (x.row_scales, x.channel_scales, x.bias)
    return (x.values, *(x.values if part is None else part for part in optional))


def _num_warps(block: int) -> int:
    return max(4, min(16, block // 512)) if block <= 16384 else 32
