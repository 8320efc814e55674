"""A matrix times one row, in Triton: what a single stream's products are, bound by reading the weight.

A program sums some of the outputs. Its first piece of the weight is on its way before the row is there, so
the gap behind the kernel that makes the row costs no bandwidth. Imported on CUDA only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from longshore_server.native.gpu.triton_overlap import has_dependent_launch, wait_for_previous

MANY_OUTPUTS = 16384  # from so many on, fewer of them in a program, each read in longer pieces
FEW, MANY = (8, 1024), (4, 2048)  # outputs, columns: 16 kB of bf16


@triton.jit
def _gemv_kernel(
    row, weight, bias, output,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    outputs = tl.program_id(0) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    columns = tl.arange(0, BLOCK)
    places = weight + outputs.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    piece = tl.load(places)
    wait_for_previous(PDL)
    total = piece.to(tl.float32) * tl.load(row + columns).to(tl.float32)[None, :]
    for start in range(BLOCK, WIDTH, BLOCK):
        piece = tl.load(places + start)
        total += piece.to(tl.float32) * tl.load(row + start + columns).to(tl.float32)[None, :]
    result = tl.sum(total, axis=1)
    if HAS_BIAS:
        result += tl.load(bias + outputs).to(tl.float32)
    tl.store(output + outputs, result.to(output.dtype.element_ty))


def can_multiply(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether multiply_row() takes these: one row, sides that its blocks divide, 16-bit numbers."""
    num_outputs, width = weight.shape
    blocks = MANY if num_outputs >= MANY_OUTPUTS else FEW
    fits = num_outputs % blocks[0] == 0 and width % blocks[1] == 0 and weight.is_contiguous()
    return rows.is_cuda and rows.shape[0] == 1 and rows.element_size() == 2 and fits


def multiply_row(row: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`row` [1, in] times `weight` [out, in] transposed, summed in float32: [1, out]."""
    num_outputs, width = weight.shape
    output = torch.empty(1, num_outputs, dtype=row.dtype, device=row.device)
    block_outputs, block = MANY if num_outputs >= MANY_OUTPUTS else FEW
    pdl = has_dependent_launch(row.device)
    _gemv_kernel[(num_outputs // block_outputs,)](
        row, weight, row if bias is None else bias, output, WIDTH=width, HAS_BIAS=bias is not None,
        BLOCK_OUTPUTS=block_outputs, BLOCK=block, PDL=pdl, launch_pdl=pdl, num_warps=4,
    )  # fmt: skip
    return output
