"""A product with its parts added and its scales multiplied out, in one kernel: what ranks add up is plain."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from longshore_server.native.model.fp8 import ScaledOutput
from longshore_server.native.model.triton_rows import _load_sum, _pointers

BLOCK = 1024


@triton.jit
def _resolve_kernel(
    values, row_scales, channel_scales, output, num_columns, stride,
    HAS_SCALES: tl.constexpr, NUM_PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < num_columns
    result = _load_sum(values + row * stride + columns, mask, tl.num_programs(0) * stride, NUM_PARTS)
    if HAS_SCALES:
        scales = tl.load(channel_scales + columns, mask=mask, other=0.0)
        result = result * tl.load(row_scales + row) * scales
    tl.store(output + row * num_columns + columns, result.to(output.dtype.element_ty), mask=mask)


def resolve(product: ScaledOutput, dtype: torch.dtype) -> torch.Tensor:
    """ScaledOutput.resolve() of a product that has no bias: [tokens, channels], contiguous."""
    assert product.bias is None
    values = product.values if product.values.stride(-1) == 1 else product.values.contiguous()
    num_rows, num_columns = values.shape[-2:]
    output = torch.empty(num_rows, num_columns, dtype=dtype, device=values.device)
    _resolve_kernel[(num_rows, triton.cdiv(num_columns, BLOCK))](
        values,
        *_pointers(product)[1:3],
        output,
        num_columns,
        values.stride(-2),
        HAS_SCALES=product.row_scales is not None,
        NUM_PARTS=product.num_parts,
        BLOCK=BLOCK,
        num_warps=4,
    )
    return output
