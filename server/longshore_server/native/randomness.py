"""Counter-based noise: a function of a row's keys (longshore.seeds) and the token id, and of nothing else.

Integer arithmetic alone makes the bits, so that they are the same on every device, in every batch and after
every restart; any replica can continue an answer. It keeps no state.
"""

from __future__ import annotations

import torch

_MASK_32 = 0xFFFFFFFF


def gumbel_noise(keys: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise [rows, tokens] for `keys` [rows, 2] and `token_ids` [rows or 1, tokens], int64.

    arg-max of log-probability plus this noise draws from the distribution (Gumbel-max), token by token
    independent of how the vocabulary is ordered or filtered.
    """
    bits = _mix32(token_ids * 0x9E3779B1 + keys[:, :1])
    bits = _mix32(bits ^ keys[:, 1:])
    # -log(1 - u) keeps full precision for small u, which is where winners come from; u stays below 1.
    uniform = ((bits.to(torch.float32) + 0.5) * 2.0**-32).clamp_(max=1.0 - 2.0**-24)
    return torch.log1p(-uniform).neg_().log_().neg_()


def _mix32(value: torch.Tensor) -> torch.Tensor:
    """The 32-bit finalizer `lowbias32` (Wellons, 2018), on int64 tensors; products wrap harmlessly."""
    value = value & _MASK_32
    value = ((value ^ (value >> 16)) * 0x7FEB352D) & _MASK_32
    value = ((value ^ (value >> 15)) * 0x846CA68B) & _MASK_32
    return value ^ (value >> 16)
