"""Triton kernels over whole rows: add + RMSNorm, SiLU-and-multiply, and FP8 quantization of what they give.

References and shapes stand in fused_ops.py. Imported on CUDA only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from longshore_server.native.gpu.triton_overlap import has_dependent_launch, wait_for_previous
from longshore_server.native.model.fp8 import FP8_DTYPE, Fp8Rows, ScaledOutput

FP8_MAX: tl.constexpr = tl.constexpr(448.0)
MIN_AMAX: tl.constexpr = tl.constexpr(1e-12)


@triton.jit
def _scale_of(amax):
    return tl.maximum(amax, MIN_AMAX) / FP8_MAX


@triton.jit
def _to_fp8(y, scale):
    """One division for all numbers of a scale."""
    return tl.minimum(tl.maximum(y * (1.0 / scale), -FP8_MAX), FP8_MAX).to(tl.float8e4nv)


@triton.jit
def _store_row(row, offsets, mask, y, output, output_scales, width, TO_FP8: tl.constexpr):
    """Stores y, rounded to the output's type, or to FP8 by the row's largest magnitude."""
    place = output + row.to(tl.int64) * width + offsets
    if TO_FP8:
        scale = _scale_of(tl.max(tl.abs(y), axis=0))
        tl.store(place, _to_fp8(y, scale), mask=mask)
        tl.store(output_scales + row, scale)
    else:
        tl.store(place, y.to(output.dtype.element_ty), mask=mask)


@triton.jit
def _load_sum(places, mask, part_stride, NUM_PARTS: tl.constexpr):
    """A ScaledOutput's values in float32, its parts added up."""
    x = tl.load(places, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, NUM_PARTS):
        x += tl.load(places + part * part_stride, mask=mask, other=0.0)
    return x


@triton.jit
def _load_channels(
    values, row_scales, channel_scales, bias, row, offsets, mask, stride,
    HAS_SCALES: tl.constexpr, HAS_BIAS: tl.constexpr, NUM_PARTS: tl.constexpr,
):  # fmt: skip
    """Channels `offsets` of one row of a ScaledOutput, in float32; there is a program for each row."""
    places = values + row.to(tl.int64) * stride + offsets
    x = _load_sum(places, mask, tl.num_programs(0) * stride, NUM_PARTS)
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
    NUM_PARTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < width
    gain = tl.load(weight + offsets, mask=mask, other=0.0).to(tl.float32)
    wait_for_previous(PDL)
    x = _load_channels(
        values, row_scales, channel_scales, bias, row, offsets, mask, width, HAS_SCALES, HAS_BIAS, NUM_PARTS
    )
    stored = weight.dtype.element_ty
    place = row.to(tl.int64) * width + offsets
    if HAS_RESIDUAL:
        x = x.to(stored).to(tl.float32) + tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
        x = x.to(stored).to(tl.float32)
        tl.store(new_residual + place, x.to(stored), mask=mask)
    mean_square = tl.sum(x * x, axis=0) / width
    normed = (x * tl.rsqrt(mean_square + eps)).to(stored).to(tl.float32)
    y = (normed * gain).to(stored).to(tl.float32)
    _store_row(row, offsets, mask, y, output, output_scales, width, TO_FP8)


@triton.jit
def _load_tile(
    values, row_scale, channel_scales, bias, places, channels, is_channel, mask, part_stride,
    DTYPE: tl.constexpr, HAS_SCALES: tl.constexpr, HAS_BIAS: tl.constexpr, NUM_PARTS: tl.constexpr,
):  # fmt: skip
    """[rows, channels] of a ScaledOutput, rounded to DTYPE, in float32."""
    x = _load_sum(values + places, mask, part_stride, NUM_PARTS)
    if HAS_SCALES:
        x = x * row_scale[:, None] * tl.load(channel_scales + channels, mask=is_channel, other=0.0)[None, :]
    if HAS_BIAS:
        x += tl.load(bias + channels, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    return x.to(DTYPE).to(tl.float32)


@triton.jit
def _silu_mul(gate, up, DTYPE: tl.constexpr):
    """In DTYPE, of float32 numbers that are rounded to it."""
    active = (gate / (1.0 + tl.exp(-gate))).to(DTYPE).to(tl.float32)
    return (active * up).to(DTYPE)


@triton.jit(do_not_specialize=["num_rows"])  # one form for every number of rows of a kind
def _silu_mul_kernel(
    values, row_scales, channel_scales, bias, output, part_amax, num_rows, width,
    DTYPE: tl.constexpr, HAS_SCALES: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_AMAX: tl.constexpr,
    NUM_PARTS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A part of some rows; with HAS_AMAX also each row's largest magnitude in this part."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    part = tl.program_id(1)
    channels = part * BLOCK + tl.arange(0, BLOCK)
    is_channel = channels < width
    mask = (rows < num_rows)[:, None] & is_channel[None, :]
    wait_for_previous(PDL)
    row_scale = tl.full([BLOCK_ROWS], 1.0, tl.float32)
    if HAS_SCALES:
        row_scale = tl.load(row_scales + rows, mask=rows < num_rows, other=0.0)
    places = rows.to(tl.int64)[:, None] * (2 * width) + channels[None, :]
    part_stride = num_rows * (2 * width)
    gate = _load_tile(
        values, row_scale, channel_scales, bias, places, channels, is_channel, mask, part_stride,
        DTYPE, HAS_SCALES, HAS_BIAS, NUM_PARTS,
    )  # fmt: skip
    up = _load_tile(
        values, row_scale, channel_scales, bias, places + width, channels + width, is_channel, mask,
        part_stride, DTYPE, HAS_SCALES, HAS_BIAS, NUM_PARTS,
    )  # fmt: skip
    y = _silu_mul(gate, up, DTYPE)
    tl.store(output + rows.to(tl.int64)[:, None] * width + channels[None, :], y, mask=mask)
    if HAS_AMAX:
        amax = tl.max(tl.abs(y.to(tl.float32)), axis=1)
        tl.store(part_amax + rows * tl.num_programs(1) + part, amax, mask=rows < num_rows)


@triton.jit
def _silu_mul_to_fp8_kernel(
    values, row_scales, channel_scales, bias, output, output_scales, width,
    DTYPE: tl.constexpr, HAS_SCALES: tl.constexpr, HAS_BIAS: tl.constexpr,
    NUM_PARTS: tl.constexpr, NUM_TILES: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row, which stays in registers until its largest magnitude is known."""
    row = tl.program_id(0)
    offsets = tl.arange(0, BLOCK)
    wait_for_previous(PDL)
    tiles = ()
    amax = tl.zeros([BLOCK], tl.float32)
    for tile in tl.static_range(NUM_TILES):
        channels = tile * BLOCK + offsets
        mask = channels < width
        gate = _load_channels(
            values, row_scales, channel_scales, bias, row, channels, mask, 2 * width,
            HAS_SCALES, HAS_BIAS, NUM_PARTS,
        )  # fmt: skip
        up = _load_channels(
            values, row_scales, channel_scales, bias, row, channels + width, mask, 2 * width,
            HAS_SCALES, HAS_BIAS, NUM_PARTS,
        )  # fmt: skip
        y = _silu_mul(gate.to(DTYPE).to(tl.float32), up.to(DTYPE).to(tl.float32), DTYPE)
        amax = tl.maximum(amax, tl.abs(y.to(tl.float32)))
        tiles = tiles + (y,)  # type: ignore[assignment]  # noqa: RUF005 (Triton unpacks no tuples)
    scale = _scale_of(tl.max(amax, axis=0))
    place = output + row.to(tl.int64) * width + offsets
    for tile in tl.static_range(NUM_TILES):
        y = _to_fp8(tiles[tile].to(tl.float32), scale)
        tl.store(place + tile * BLOCK, y, mask=tile * BLOCK + offsets < width)
    tl.store(output_scales + row, scale)


@triton.jit
def _quantize_parts_kernel(
    matrix, part_amax, output, output_scales, width,
    NUM_PARTS: tl.constexpr, BLOCK_PARTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A part of a row, by the largest of the magnitudes of all its parts."""
    row = tl.program_id(0)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < width
    wait_for_previous(PDL)
    parts = tl.arange(0, BLOCK_PARTS)
    amax = tl.max(tl.load(part_amax + row * NUM_PARTS + parts, mask=parts < NUM_PARTS, other=0.0), axis=0)
    scale = _scale_of(amax)
    place = row.to(tl.int64) * width + offsets
    y = tl.load(matrix + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(output + place, _to_fp8(y, scale), mask=mask)
    if tl.program_id(1) == 0:
        tl.store(output_scales + row, scale)


@triton.jit
def _quantize_kernel(matrix, output, output_scales, width, stride, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0)
    wait_for_previous(PDL)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < width
    y = tl.load(matrix + row.to(tl.int64) * stride + offsets, mask=mask, other=0.0).to(tl.float32)
    _store_row(row, offsets, mask, y, output, output_scales, width, True)


TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
SILU_BLOCK = 1024  # channels per program
# Up to so many rows a program has a part of one. Of more it has a whole one, if that becomes FP8 and fits
# into registers, or a part of several, which share the loading of a channel's scales.
MAX_SINGLE_ROWS = 64
SILU_ROWS = 4
WHOLE_BLOCK, MAX_WHOLE_WIDTH = 4096, 28672
QUANTIZE_BLOCK = 2048


def add_rms_norm(
    x: ScaledOutput,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    to_fp8: bool,
) -> tuple[torch.Tensor | Fp8Rows, torch.Tensor]:
    num_rows, width = x.values.shape[-2:]
    output, scales = _output(num_rows, width, weight.dtype, x.values.device, to_fp8)
    new_residual = x.values if residual is None else torch.empty_like(residual)
    pdl = has_dependent_launch(x.values.device)
    block = triton.next_power_of_2(width)
    _add_rms_norm_kernel[(num_rows,)](
        *_pointers(x), residual, weight, new_residual, output, scales, width, eps,
        HAS_SCALES=x.row_scales is not None, HAS_BIAS=x.bias is not None,
        HAS_RESIDUAL=residual is not None, TO_FP8=to_fp8, NUM_PARTS=x.num_parts,
        BLOCK=block, PDL=pdl, launch_pdl=pdl, num_warps=_num_warps(block),
    )  # fmt: skip
    return (Fp8Rows(output, scales) if to_fp8 else output), new_residual


def silu_mul(x: ScaledOutput, dtype: torch.dtype, to_fp8: bool) -> torch.Tensor | Fp8Rows:
    num_rows, width = x.values.shape[-2], x.values.shape[-1] // 2
    if to_fp8 and num_rows > MAX_SINGLE_ROWS and width <= MAX_WHOLE_WIDTH:
        return _silu_mul_whole(x, dtype)
    device = x.values.device
    num_parts = triton.cdiv(width, SILU_BLOCK)
    plain = torch.empty(num_rows, width, dtype=dtype, device=device)
    part_amax = torch.empty(num_rows, num_parts, device=device) if to_fp8 else plain
    block_rows = 1 if num_rows <= MAX_SINGLE_ROWS else SILU_ROWS
    pdl = has_dependent_launch(device)
    _silu_mul_kernel[(triton.cdiv(num_rows, block_rows), num_parts)](
        *_pointers(x), plain, part_amax, num_rows, width, DTYPE=TRITON_DTYPES[dtype],
        HAS_SCALES=x.row_scales is not None, HAS_BIAS=x.bias is not None, HAS_AMAX=to_fp8,
        NUM_PARTS=x.num_parts, BLOCK_ROWS=block_rows, BLOCK=SILU_BLOCK, PDL=pdl, launch_pdl=pdl, num_warps=4,
    )  # fmt: skip
    return _quantize_parts(plain, part_amax, pdl) if to_fp8 else plain


def _silu_mul_whole(x: ScaledOutput, dtype: torch.dtype) -> Fp8Rows:
    """The same bits as in parts, but a row is read and written once."""
    num_rows, width = x.values.shape[-2], x.values.shape[-1] // 2
    output, scales = _output(num_rows, width, dtype, x.values.device, True)
    pdl = has_dependent_launch(x.values.device)
    _silu_mul_to_fp8_kernel[(num_rows,)](
        *_pointers(x), output, scales, width, DTYPE=TRITON_DTYPES[dtype],
        HAS_SCALES=x.row_scales is not None, HAS_BIAS=x.bias is not None, NUM_PARTS=x.num_parts,
        NUM_TILES=triton.cdiv(width, WHOLE_BLOCK), BLOCK=WHOLE_BLOCK, PDL=pdl, launch_pdl=pdl,
        num_warps=16, maxnreg=64,  # two programs on a multiprocessor
    )  # fmt: skip
    return Fp8Rows(output, scales)


def _quantize_parts(matrix: torch.Tensor, part_amax: torch.Tensor, pdl: bool) -> Fp8Rows:
    (num_rows, width), num_parts = matrix.shape, part_amax.shape[1]
    output, scales = _output(num_rows, width, matrix.dtype, matrix.device, True)
    _quantize_parts_kernel[(num_rows, triton.cdiv(width, QUANTIZE_BLOCK))](
        matrix, part_amax, output, scales, width,
        NUM_PARTS=num_parts, BLOCK_PARTS=triton.next_power_of_2(num_parts), BLOCK=QUANTIZE_BLOCK,
        PDL=pdl, launch_pdl=pdl, num_warps=4,
    )  # fmt: skip
    return Fp8Rows(output, scales)


def quantize_rows(matrix: torch.Tensor) -> Fp8Rows:
    num_rows, width = matrix.shape
    output, scales = _output(num_rows, width, matrix.dtype, matrix.device, True)
    pdl = has_dependent_launch(matrix.device)
    block = triton.next_power_of_2(width)
    _quantize_kernel[(num_rows,)](
        matrix, output, scales, width, matrix.stride(0),
        BLOCK=block, PDL=pdl, launch_pdl=pdl, num_warps=_num_warps(block),
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
    """16 numbers a thread, by the block alone: how a row is added up must not depend on who is beside it."""
    return max(4, min(16, block // 512)) if block <= 16384 else 32
