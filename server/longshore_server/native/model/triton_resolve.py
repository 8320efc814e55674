"""A product with its scales multiplied out, in one kernel: what ranks add up must be plain."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from longshore_server.native.model.fp8 import ScaledOutput

BLOCK = 1024


@triton.jit
def _resolve_kernel(values, row_scales, channel_scales, output, num_columns, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < num_columns
    loaded = tl.load(values + row * stride + columns, mask=mask, other=0.0).to(tl.float32)
    scales = tl.load(channel_scales + columns, mask=mask, other=0.0)
    result = loaded * tl.load(row_scales + row) * scales
    tl.store(output + row * num_columns + columns, result.to(output.dtype.element_ty), mask=mask)


def resolve(product: ScaledOutput, dtype: torch.dtype) -> torch.Tensor:
    """ScaledOutput.resolve() of a product that has scales and no bias: [tokens, channels], contiguous."""
    assert product.row_scales is not None and product.channel_scales is not None and product.bias is None
    values = product.values if product.values.stride(1) == 1 else product.values.contiguous()
    output = torch.empty(values.shape, dtype=dtype, device=values.device)
    num_rows, num_columns = values.shape
    _resolve_kernel[(num_rows, triton.cdiv(num_columns, BLOCK))](
        values,
        product.row_scales,
        product.channel_scales,
        output,
        num_columns,
        values.stride(0),
        BLOCK=BLOCK,
        num_warps=4,
    )
    return output
