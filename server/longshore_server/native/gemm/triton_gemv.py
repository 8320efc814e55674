"""A matrix times one row, in Triton: what a single stream's products are, bound by reading the weight.

A program sums few outputs. Its first piece of the weight, often all of it, is on its way into registers
before the row is there, so the gap behind the kernel that makes the row costs no bandwidth. Imported on CUDA
only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from longshore_server.native.gpu.triton_overlap import has_dependent_launch, wait_for_previous

# Rows up to the first size are read whole, several to a piece; FP8's up to the second, one to a piece; longer
# ones in pieces of eight rows. Measured on an H200 between the kernels that stand beside a product in a step.
WHOLE_ROW_BYTES, LONG_FP8_ROW_BYTES = 16 * 1024, 32 * 1024
PIECE_BYTES = 16 * 1024


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


def can_multiply(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether multiply_row() takes these: one row on a GPU, and outputs that fill its programs."""
    fits = weight.shape[0] % _piece_of(weight)[0] == 0 and weight.is_contiguous()
    return fits and rows.is_cuda and rows.shape[0] == 1 and rows.dtype == weight.dtype


def multiply_row(
    row: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """`row` [1, in] times `weight` [out, in] transposed, summed in float32: [1, out] in `dtype`.

    FP8 is multiplied unscaled.
    """
    num_outputs, width = weight.shape
    output = torch.empty(1, num_outputs, dtype=dtype, device=row.device)
    block_outputs, block, num_warps = _piece_of(weight)
    pdl = has_dependent_launch(row.device)
    _gemv_kernel[(num_outputs // block_outputs,)](
        row, weight, row if bias is None else bias, output, WIDTH=width, HAS_BIAS=bias is not None,
        BLOCK_OUTPUTS=block_outputs, BLOCK=block, PDL=pdl, launch_pdl=pdl, num_warps=num_warps,
    )  # fmt: skip
    return output


def _piece_of(weight: torch.Tensor) -> tuple[int, int, int]:
    """Outputs and columns of what a program reads at once, and its warps."""
    width, num_bytes = weight.shape[1], weight.element_size()
    block = triton.next_power_of_2(width)
    if width * num_bytes <= WHOLE_ROW_BYTES:
        return PIECE_BYTES // (block * num_bytes), block, 8
    if num_bytes == 1 and width <= LONG_FP8_ROW_BYTES:
        return 1, block, 16
    return 8, PIECE_BYTES // (8 * num_bytes), 4
