"""A matrix product in Triton, each of whose rows is the same to the last bit among any number of others.

A library picks its kernel by the number of rows, and with it the order in which an output is summed. Here is
one tile shape, and one program sums an output over blocks of columns from the first to the last. Imported on
CUDA only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK_ROWS, BLOCK_OUTPUTS = 128, 128
BLOCK_BYTES = 128  # of each row and weight at a time
GROUP_TILES = 8  # tiles of rows that go over the same weights together, while those are in the L2 cache
DTYPES = (torch.bfloat16, torch.float16, torch.float8_e4m3fn)


@triton.jit(do_not_specialize=["num_rows"])  # one compiled kernel for every number of rows
def _gemm_kernel(
    rows, weight, bias, output, num_rows,
    NUM_OUTPUTS: tl.constexpr, WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_OUTPUTS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    group_programs = GROUP * tl.cdiv(NUM_OUTPUTS, BLOCK_OUTPUTS)
    first_tile = program // group_programs * GROUP
    group_height = tl.minimum(tl.cdiv(num_rows, BLOCK_ROWS) - first_tile, GROUP)
    row_tile = first_tile + program % group_programs % group_height
    output_tile = program % group_programs // group_height

    row_ids = row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    output_ids = output_tile * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    columns = tl.arange(0, BLOCK)
    is_row, is_output = row_ids < num_rows, output_ids < NUM_OUTPUTS
    row_places = rows + row_ids.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    weight_places = weight + output_ids.to(tl.int64)[None, :] * WIDTH + columns[:, None]
    total = tl.zeros([BLOCK_ROWS, BLOCK_OUTPUTS], tl.float32)
    for start in range(0, WIDTH, BLOCK):
        row_mask, weight_mask = is_row[:, None], is_output[None, :]
        if WIDTH % BLOCK:
            row_mask &= columns[None, :] < WIDTH - start
            weight_mask &= columns[:, None] < WIDTH - start
        x = tl.load(row_places + start, mask=row_mask, other=0.0)
        w = tl.load(weight_places + start, mask=weight_mask, other=0.0)
        total = tl.dot(x, w, total)
    if HAS_BIAS:
        total += tl.load(bias + output_ids, mask=is_output, other=0.0).to(tl.float32)[None, :]
    places = output + row_ids.to(tl.int64)[:, None] * NUM_OUTPUTS + output_ids[None, :]
    tl.store(places, total.to(output.dtype.element_ty), mask=is_row[:, None] & is_output[None, :])


def multiply(
    rows: torch.Tensor,  # [rows, in] of one of DTYPES
    weight: torch.Tensor,  # [out, in] of the same
    bias: torch.Tensor | None,  # [out]
    dtype: torch.dtype,
) -> torch.Tensor:
    """`rows` times `weight` transposed, summed in float32, and `bias`: [rows, out] in `dtype`."""
    num_rows, (num_outputs, width) = rows.shape[0], weight.shape
    output = torch.empty(num_rows, num_outputs, dtype=dtype, device=rows.device)
    num_tiles = triton.cdiv(num_rows, BLOCK_ROWS) * triton.cdiv(num_outputs, BLOCK_OUTPUTS)
    _gemm_kernel[(num_tiles,)](
        rows.contiguous(), weight.contiguous(), output if bias is None else bias, output, num_rows,
        NUM_OUTPUTS=num_outputs, WIDTH=width, HAS_BIAS=bias is not None,
        BLOCK_ROWS=BLOCK_ROWS, BLOCK_OUTPUTS=BLOCK_OUTPUTS, BLOCK=BLOCK_BYTES // rows.element_size(),
        GROUP=GROUP_TILES, num_warps=8, num_stages=3,
    )  # fmt: skip
    return output
