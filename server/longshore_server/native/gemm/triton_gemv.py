"""A matrix times one row, in Triton: what a single stream's products are, bound by reading the weight.

A program sums few outputs. Its first piece of the weight, often all of it, is on its way into registers
before the row is there, so the gap behind the kernel that makes the row costs no bandwidth. FP8 has a kernel
of its own: a chip that reads at full speed is at its power limit, so each instruction that is saved is time.
Imported on CUDA only.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from longshore_server.native.gpu.triton_overlap import has_dependent_launch, wait_for_previous

PIECE_BYTES = 16 * 1024  # what a program of eight warps reads at once of rows that fit
LONG_ROW_OUTPUTS = 8  # of longer rows, in parts
# FP8 of up to 448 is multiplied in half precision, whose range ends at 65504: room for 83 products.
ROW_SCALE: tl.constexpr = tl.constexpr(1 / 256)
FP8_PIECES = range(4, 9)  # of a row; as many products are summed in half precision
FP8_PIECE_NUMBERS = 4096
FP8_BLOCKS = (4096, 2048, 1024, 512, 256)  # columns of a piece


@triton.jit
def _gemv_kernel(
    row, weight, bias, output,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    outputs = tl.program_id(0) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    columns = tl.arange(0, BLOCK)
    places = weight + outputs.to(tl.int64)[:, None] * WIDTH
    mask = columns < WIDTH
    piece = tl.load(places + columns[None, :], mask=mask[None, :], other=0.0)
    wait_for_previous(PDL)
    total = piece.to(tl.float32) * tl.load(row + columns, mask=mask, other=0.0).to(tl.float32)[None, :]
    for start in range(BLOCK, WIDTH, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < WIDTH
        piece = tl.load(places + columns[None, :], mask=mask[None, :], other=0.0)
        total += piece.to(tl.float32) * tl.load(row + columns, mask=mask, other=0.0).to(tl.float32)[None, :]
    result = tl.sum(total, axis=1)
    if HAS_BIAS:
        result += tl.load(bias + outputs).to(tl.float32)
    tl.store(output + outputs, result.to(output.dtype.element_ty))


@triton.jit
def _multiply_add_fp8(weight, row, total):
    """`total` + `weight` * `row`, two numbers at a time, in half precision."""
    return tl.inline_asm_elementwise(
        """
        {
            .reg .b16 low, high;
            .reg .b32 first, second;
            mov.b32 {low, high}, $2;
            cvt.rn.f16x2.e4m3x2 first, low;
            cvt.rn.f16x2.e4m3x2 second, high;
            fma.rn.f16x2 $0, first, $3, $5;
            fma.rn.f16x2 $1, second, $4, $6;
        }
        """,
        "=&r,=&r,r,r,r,r,r", [weight, row, total], dtype=tl.float16, is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def _load_pieces(places, NUM_PIECES: tl.constexpr, BLOCK: tl.constexpr):
    # Triton adds tuples up, but knows no star.
    pieces = (tl.load(places),)
    for index in tl.static_range(1, NUM_PIECES):
        pieces = pieces + (tl.load(places + index * BLOCK),)  # type: ignore[assignment]  # noqa: RUF005
    return pieces


@triton.jit
def _gemv_fp8_kernel(
    row, weight, output,
    BLOCK_OUTPUTS: tl.constexpr, NUM_PIECES: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    outputs = tl.program_id(0) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    columns = tl.arange(0, BLOCK)
    places = weight + outputs.to(tl.int64)[:, None] * (NUM_PIECES * BLOCK) + columns[None, :]
    pieces = _load_pieces(places, NUM_PIECES, BLOCK)
    wait_for_previous(PDL)
    total = tl.zeros([BLOCK_OUTPUTS, BLOCK], tl.float16)
    for index in tl.static_range(NUM_PIECES):
        numbers = tl.load(row + index * BLOCK + columns).to(tl.float16) * ROW_SCALE
        total = _multiply_add_fp8(pieces[index], tl.broadcast_to(numbers[None, :], total.shape), total)
    result = tl.sum(total.to(tl.float32), axis=1) / ROW_SCALE
    tl.store(output + outputs, result.to(output.dtype.element_ty))


@dataclass(frozen=True, slots=True)
class _Launch:
    """How a weight is cut: each program takes `block_outputs` rows of it, `block` columns at a time."""

    block_outputs: int
    block: int
    num_warps: int
    num_pieces: int | None = None  # of `block` columns, which are a whole row: for the kernel of FP8


def can_multiply(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether multiply_row() takes these: one row of 8 or 16 bits on a GPU, outputs that fill programs."""
    if rows.shape[0] != 1 or rows.element_size() > 2 or not rows.is_cuda or rows.dtype != weight.dtype:
        return False
    num_outputs, width = weight.shape
    is_whole = num_outputs % _launch_of(width, weight.element_size()).block_outputs == 0
    return is_whole and rows.is_contiguous() and weight.is_contiguous()


def multiply_row(
    row: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """`row` [1, in] times `weight` [out, in] transposed, summed in float32: [1, out] in `dtype`.

    FP8 is multiplied unscaled, and a few of its products may be summed in half precision first.
    """
    num_outputs, width = weight.shape
    output = torch.empty(1, num_outputs, dtype=dtype, device=row.device)
    of = _launch_of(width, weight.element_size())
    pdl = has_dependent_launch(row.device)
    grid = (num_outputs // of.block_outputs,)
    common = {"BLOCK_OUTPUTS": of.block_outputs, "BLOCK": of.block, "num_warps": of.num_warps}
    common |= {"PDL": pdl, "launch_pdl": pdl}
    if of.num_pieces and bias is None:
        _gemv_fp8_kernel[grid](row, weight, output, NUM_PIECES=of.num_pieces, **common)
    else:
        operands = row, weight, row if bias is None else bias, output
        _gemv_kernel[grid](*operands, WIDTH=width, HAS_BIAS=bias is not None, **common)
    return output


@functools.cache
def _launch_of(width: int, num_bytes: int) -> _Launch:
    """The fastest on an H200 at its power limit, among the kernels that stand around a product in a step."""
    if num_bytes == 1:
        for block in FP8_BLOCKS:
            if width % block == 0 and width // block in FP8_PIECES:
                num_pieces = width // block
                num_warps = 4 if num_pieces == 4 else 8
                return _Launch(FP8_PIECE_NUMBERS // block, block, num_warps, num_pieces)
    block = triton.next_power_of_2(width)
    if block * num_bytes <= PIECE_BYTES:
        return _Launch(PIECE_BYTES // (block * num_bytes), block, 8)
    return _Launch(LONG_ROW_OUTPUTS, PIECE_BYTES // (LONG_ROW_OUTPUTS * num_bytes), 4)
