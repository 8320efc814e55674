"""Lets a kernel begin while the one before it ends: programmatic dependent launch, on Hopper and newer.

A kernel launched with `launch_pdl` may start early, so it waits before it touches what others gave (CUDA C++
Programming Guide). What it does before that, the end of the other hides.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """From here on everything that the kernels before have written can be read."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@cache
def has_dependent_launch(device: torch.device) -> bool:
    """Whether this is a GPU that knows programmatic dependent launch."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9
