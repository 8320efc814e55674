"""FP8 (e4m3) numbers: rows with a scale each, and what a product over them gives, on any device.

A product comes out unscaled (`ScaledOutput`); whoever reads it next multiplies by the scales, since scaling
inside the GEMM is slower at few rows.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

FP8_DTYPE = torch.float8_e4m3fn
FP8_MAX = 448.0  # largest finite e4m3
MIN_AMAX = 1e-12  # a row of zeros still needs a scale to divide by
SCALED_MM_MULTIPLE = 16  # torch._scaled_mm takes matrices whose sides are multiples of it


@dataclass(frozen=True, slots=True)
class Fp8Rows:
    """A matrix in FP8; row i stands for `values[i] * scales[i]`."""

    values: torch.Tensor  # [rows, columns], e4m3
    scales: torch.Tensor  # [rows], float32

    def dequantize(self) -> torch.Tensor:
        """[rows, columns] in float32."""
        return self.values.float() * self.scales[:, None]


@dataclass(frozen=True, slots=True)
class ScaledOutput:
    """What a linear layer gave; it stands for `values * row_scales * channel_scales + bias`.

    Scales are both there or both None; the bias is there only beside scales, else `values` has it already.
    A product that was cut along its width comes in parts, which the reader adds up.
    """

    values: torch.Tensor  # [tokens, channels], or [parts, tokens, channels] in float32
    row_scales: torch.Tensor | None = None  # [tokens], float32
    channel_scales: torch.Tensor | None = None  # [channels], float32
    bias: torch.Tensor | None = None  # [channels]

    @property
    def num_parts(self) -> int:
        return 1 if self.values.ndim == 2 else self.values.shape[0]

    def resolve(self, dtype: torch.dtype) -> torch.Tensor:
        """The plain tensor [tokens, channels], rounded once to `dtype`."""
        values = self.values if self.values.ndim == 2 else self.values.sum(0)
        if self.row_scales is None or self.channel_scales is None:
            return values.to(dtype)
        result = values.float() * self.row_scales[:, None] * self.channel_scales
        return (result if self.bias is None else result + self.bias.float()).to(dtype)


@functools.cache
def unit_scale(device: torch.device) -> torch.Tensor:
    """The scale 1 of a whole matrix, made once per device: a graph must not capture its making."""
    return torch.ones((), device=device)


def quantize_rows(matrix: torch.Tensor) -> Fp8Rows:
    """Each row by its own largest magnitude; the reference of the kernels that do it on a GPU."""
    floats = matrix.float()
    scales = floats.abs().amax(dim=-1).clamp_min(MIN_AMAX) / FP8_MAX
    values = (floats / scales[:, None]).clamp(-FP8_MAX, FP8_MAX).to(FP8_DTYPE)
    return Fp8Rows(values, scales)
