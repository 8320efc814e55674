"""Greedy and plain temperature sampling of many rows on the GPU: the draw of `sampler`, in two kernels.

A row's randomness is the same function of (seed, position) and token as everywhere else. Filters, penalties,
bias and logprobs are the sampler's. It waits for nothing, so it can stand in a captured graph.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK_VOCAB = 2048


@triton.jit
def _mix32(value):
    """The 32-bit finalizer `lowbias32` (Wellons, 2018), as in `randomness`."""
    value = (value ^ (value >> 16)) * 0x7FEB352D
    value = (value ^ (value >> 15)) * 0x846CA68B
    return value ^ (value >> 16)


@triton.jit
def _gumbel(token_ids, key_0, key_1):
    bits = _mix32(token_ids.to(tl.uint32) * 0x9E3779B1 + key_0)
    bits = _mix32(bits ^ key_1)
    uniform = (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    uniform = tl.minimum(uniform, 0.99999994)
    # -log(1 - u); for small u, where winners come from, the series keeps what 1 - u would round away
    series = uniform * (1.0 + uniform * (0.5 + uniform * 0.3333333333))
    exponential = tl.where(uniform < 0.00390625, series, -tl.log(1.0 - uniform))
    return -tl.log(exponential)


@triton.jit
def _part_kernel(
    logits,
    temperatures,
    keys,
    part_values,
    part_ids,
    part_flags,
    logits_stride,
    vocab_size,
    num_parts,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    token_ids = part * BLOCK + tl.arange(0, BLOCK)
    mask = token_ids < vocab_size
    values = tl.load(logits + row * logits_stride + token_ids, mask=mask, other=float("-inf")).to(tl.float32)
    is_odd = (values != values) | (values == float("inf"))
    temperature = tl.load(temperatures + row).to(tl.float32)
    if temperature > 0:
        key_0 = tl.load(keys + 2 * row).to(tl.uint32)
        key_1 = tl.load(keys + 2 * row + 1).to(tl.uint32)
        values = values / temperature + _gumbel(token_ids, key_0, key_1)
    values = tl.where(mask & (values == values), values, float("-inf"))
    best = tl.argmax(values, 0)
    place = row * num_parts + part
    tl.store(part_values + place, tl.max(values, 0))
    tl.store(part_ids + place, part * BLOCK + best)
    tl.store(part_flags + place, tl.max(is_odd.to(tl.int32), 0))


@triton.jit
def _choose_kernel(
    part_values, part_ids, part_flags, seats, last_tokens, sampled, num_parts, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    parts = tl.arange(0, BLOCK)
    mask = parts < num_parts
    values = tl.load(part_values + row * num_parts + parts, mask=mask, other=float("-inf"))
    flags = tl.load(part_flags + row * num_parts + parts, mask=mask, other=0)
    token_id = tl.load(part_ids + row * num_parts + tl.argmax(values, 0)).to(tl.int64)
    is_usable = (tl.max(flags, 0) == 0) & (tl.max(values, 0) > float("-inf"))
    tl.store(sampled + row, tl.where(is_usable, token_id, -1))
    tl.store(last_tokens + tl.load(seats + row), tl.where(is_usable, token_id, 0))


def sample_rows(
    logits: torch.Tensor,  # [rows, vocab]
    temperatures: torch.Tensor,  # [rows] float; 0 takes the likeliest
    keys: torch.Tensor,  # [rows, 2] int64, contiguous: longshore.seeds.row_keys
    seats: torch.Tensor,  # [rows] int64
    last_tokens: torch.Tensor,  # [seats] int64; each row's token is put at its seat
    sampled: torch.Tensor,  # [rows] int64; the tokens, -1 where the logits are not finite
) -> None:
    """Chooses a token for each row and leaves it on the device, in `sampled` and in `last_tokens`."""
    num_rows, vocab_size = logits.shape
    num_parts = -(-vocab_size // BLOCK_VOCAB)
    part_values = torch.empty(num_rows, num_parts, dtype=torch.float32, device=logits.device)
    part_ids = torch.empty(num_rows, num_parts, dtype=torch.int32, device=logits.device)
    part_flags = torch.empty_like(part_ids)
    _part_kernel[(num_rows, num_parts)](
        logits,
        temperatures,
        keys,
        part_values,
        part_ids,
        part_flags,
        logits.stride(0),
        vocab_size,
        num_parts,
        BLOCK=BLOCK_VOCAB,
        num_warps=8,
    )
    _choose_kernel[(num_rows,)](
        part_values,
        part_ids,
        part_flags,
        seats,
        last_tokens,
        sampled,
        num_parts,
        BLOCK=triton.next_power_of_2(num_parts),
        num_warps=4,
    )
