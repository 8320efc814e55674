"""Counter-based randomness, bit for bit that of the core: a function of (seed, position, token id).

The same integer arithmetic as the core's sampler, so that an answer begun on either can be gone on with on
the other. It keeps no state.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_MASK_32 = np.uint64(0xFFFFFFFF)
_LARGEST_UNIFORM = np.float32(1.0 - 2.0**-24)


def gumbel_noise(keys: tuple[int, int], token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Standard Gumbel noise [tokens]; arg-max of log-probability plus noise draws from the distribution."""
    ids = token_ids.astype(np.uint64)
    bits = _mix32(ids * np.uint64(0x9E3779B1) + np.uint64(keys[0]))
    bits = _mix32(bits ^ np.uint64(keys[1]))
    # -log(1 - u) keeps full precision for small u, which is where winners come from; u stays below 1.
    uniform = (bits.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
    exponential = -np.log1p(-np.minimum(uniform, _LARGEST_UNIFORM))
    noise: NDArray[np.float32] = -np.log(exponential)
    return noise


def _mix32(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The 32-bit finalizer `lowbias32` (Wellons, 2018), in 64-bit integers; products wrap harmlessly."""
    value = value & _MASK_32
    value = ((value ^ (value >> np.uint64(16))) * np.uint64(0x7FEB352D)) & _MASK_32
    value = ((value ^ (value >> np.uint64(15))) * np.uint64(0x846CA68B)) & _MASK_32
    return value ^ (value >> np.uint64(16))
