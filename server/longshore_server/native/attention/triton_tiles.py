"""Sizes and precision of a tensor-core product in Triton, for every attention kernel."""

from __future__ import annotations

import torch
import triton

MIN_SIDE = 16


def tile_side(size: int) -> int:
    """The side of the tile that holds `size` rows or columns."""
    return max(MIN_SIDE, int(triton.next_power_of_2(size)))


def dot_precision(dtype: torch.dtype) -> str:
    """Of a product of float32 numbers, all of them; other types have but one."""
    return "ieee" if dtype == torch.float32 else "tf32"
