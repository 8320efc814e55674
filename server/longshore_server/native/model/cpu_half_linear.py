"""Linear layers for CPUs whose weights fit 16 bits without loss: half the memory to read, float32 arithmetic.

A bf16 checkpoint has 8 significant bits, a half float 11: times a power of two, such weights are half floats
exactly, and FBGEMM multiplies those with float32 rows. Weights that would lose a bit are refused.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import nn

# FBGEMM cuts rows into blocks of this many, and each block into kernels of 1 to 6 rows (FbgemmFPCommon.h).
BLOCK_ROWS = 120
_LARGEST_EXPONENT = 15  # of a half float


class HalfPackedLinear(nn.Module):
    """A linear layer over weights that `exact_scale` takes; gradients are not supported.

    The kernels of 1 and 2 rows sum in another order than the others, so rows are added until none of those
    is used: a row's result is then the same to the last bit in every batch.
    """

    def __init__(self, linear: nn.Linear, scale: float) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed = torch.ops.quantized.linear_prepack_fp16(linear.weight.detach() * scale, None)
        self.unscale = 1.0 / scale
        self.bias = linear.bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        rows = inputs.reshape(-1, self.in_features)
        num_rows = rows.shape[0]
        num_padded = padded_rows(num_rows)
        if num_padded != num_rows:
            rows = torch.nn.functional.pad(rows, (0, 0, 0, num_padded - num_rows))
        output = torch.ops.quantized.linear_dynamic_fp16(rows, self.packed)[:num_rows]
        if self.unscale != 1.0:
            output.mul_(self.unscale)
        if self.bias is not None:
            output += self.bias
        return output.view(*inputs.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


@torch.inference_mode()
def exact_scale(weight: torch.Tensor) -> float | None:
    """A power of two that makes every weight a half float, 1 if they are already; None if there is none."""
    if not is_available() or not bool(torch.isfinite(weight).all()):
        return None
    largest = float(weight.abs().max())
    exponent = math.frexp(largest)[1]
    for scale in (1.0, 2.0 ** (_LARGEST_EXPONENT - exponent)):
        if torch.equal((weight * scale).half().float(), weight * scale):
            return scale
    return None


@cache
def padded_rows(num_rows: int) -> int:
    """The next number of rows that no kernel with another order of summation takes part in."""
    num_whole, num_left = divmod(num_rows, BLOCK_ROWS)
    if num_left == 0:
        return num_rows
    return num_whole * BLOCK_ROWS + min(n for n in (*_invariant_rows(), BLOCK_ROWS) if n >= num_left)


@cache
def is_available() -> bool:
    """Whether this build of torch has FBGEMM, and its whole blocks are row-invariant."""
    try:
        return len(_invariant_rows()) > 0
    except (AttributeError, RuntimeError):
        return False


@cache
@torch.inference_mode()
def _invariant_rows() -> tuple[int, ...]:
    """The numbers of rows up to a block whose results equal a block's, found by trying."""
    weight = torch.arange(64.0 * 200).sin().view(64, 200).half().float()
    packed = torch.ops.quantized.linear_prepack_fp16(weight, None)
    rows = torch.linspace(-3.0, 3.0, 2 * BLOCK_ROWS * 200).sin().view(2 * BLOCK_ROWS, 200)
    whole = torch.ops.quantized.linear_dynamic_fp16(rows, packed)
    offsets = (0, 1, 47)

    def is_invariant(num_rows: int) -> bool:
        return all(
            torch.equal(
                torch.ops.quantized.linear_dynamic_fp16(rows[start : start + num_rows], packed),
                whole[start : start + num_rows],
            )
            for start in offsets
        )

    return tuple(num_rows for num_rows in range(1, BLOCK_ROWS + 1) if is_invariant(num_rows))
