"""Greedy, plain and filtered sampling of many rows on the GPU: the draw of `sampler`, in a few kernels.

A row's randomness is the same function of (seed, position) and token as everywhere else. Penalties, bias and
logprobs are the sampler's. It waits for nothing, so it can stand in a captured graph.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np
import torch
import triton
import triton.language as tl

from longshore_server.native.gpu.step_inputs import noise_keys, temperature_bits
from longshore_server.native.gpu.triton_filters import filter_limits
from longshore_server.native.sequence import Sequence

BLOCK_VOCAB = 2048
MAX_TOP_K = 2**31 - 1


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
    row_ids,
    best_logits,
    limits,
    logits_stride,
    vocab_size,
    num_parts,
    BLOCK: tl.constexpr,
    IS_FILTERED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    source = logits + (tl.load(row_ids + row) if IS_FILTERED else row) * logits_stride
    token_ids = part * BLOCK + tl.arange(0, BLOCK)
    mask = token_ids < vocab_size
    values = tl.load(source + token_ids, mask=mask, other=float("-inf")).to(tl.float32)
    is_odd = (values != values) | (values == float("inf"))
    temperature = tl.load(temperatures + row).to(tl.float32)
    if temperature > 0:
        key_0 = tl.load(keys + 2 * row).to(tl.uint32)
        key_1 = tl.load(keys + 2 * row + 1).to(tl.uint32)
        noise = _gumbel(token_ids, key_0, key_1)
        if IS_FILTERED:
            distances = (tl.load(best_logits + row) - values) / temperature
            is_kept = distances.to(tl.int32, bitcast=True) <= tl.load(limits + row)
            values = tl.where(is_kept, noise - distances, float("-inf"))
        else:
            values = values / temperature + noise
    values = tl.where(mask & (values == values), values, float("-inf"))
    best = tl.argmax(values, 0)
    place = row * num_parts + part
    tl.store(part_values + place, tl.max(values, 0))
    tl.store(part_ids + place, part * BLOCK + best)
    tl.store(part_flags + place, tl.max(is_odd.to(tl.int32), 0))


@triton.jit
def _choose_kernel(
    part_values,
    part_ids,
    part_flags,
    row_ids,
    seats,
    last_tokens,
    sampled,
    num_parts,
    BLOCK: tl.constexpr,
    IS_FILTERED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    parts = tl.arange(0, BLOCK)
    mask = parts < num_parts
    values = tl.load(part_values + row * num_parts + parts, mask=mask, other=float("-inf"))
    flags = tl.load(part_flags + row * num_parts + parts, mask=mask, other=0)
    token_id = tl.load(part_ids + row * num_parts + tl.argmax(values, 0)).to(tl.int64)
    is_usable = (tl.max(flags, 0) == 0) & (tl.max(values, 0) > float("-inf"))
    place = tl.load(row_ids + row) if IS_FILTERED else row
    tl.store(sampled + place, tl.where(is_usable, token_id, -1))
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
    _sample(logits, temperatures, keys, seats, last_tokens, sampled, None)


def sample_filtered_rows(
    logits: torch.Tensor,  # [rows, vocab]
    numbers: torch.Tensor,  # [8, filtered] int64, contiguous: see filter_numbers
    last_tokens: torch.Tensor,
    sampled: torch.Tensor,  # [rows] int64; the other rows' tokens stay
) -> None:
    """Chooses tokens again for the rows that `numbers` names, among what their filters keep."""
    rows, seats, temperatures, top_ks, top_ps, first_limits = numbers[:6]
    temperatures = temperatures.view(torch.float64)
    limits = filter_limits(logits, rows, temperatures, top_ks, top_ps.view(torch.float64), first_limits)
    keys = numbers[6:].reshape(-1, 2)
    _sample(logits, temperatures, keys, seats, last_tokens, sampled, (rows, *limits))


def filter_numbers(
    rows: SequenceOf[int], seats: SequenceOf[int], sequences: SequenceOf[Sequence], *, pinned: bool
) -> torch.Tensor:
    """[8, filtered]: row, seat, temperature, top-k, top-p, min-p as the bits of a distance, and two keys."""
    numbers = torch.empty(8, len(rows), dtype=torch.int64, pin_memory=pinned)
    host = numbers.numpy()
    params = [sequence.params for sequence in sequences]
    host[0], host[1], host[2] = rows, seats, temperature_bits(sequences)
    host[3] = [min(each.top_k, MAX_TOP_K) if each.top_k > 0 else MAX_TOP_K for each in params]
    host[4] = np.array([each.top_p for each in params], dtype=np.float64).view(np.int64)
    min_p = np.array([each.min_p for each in params], dtype=np.float32)
    with np.errstate(divide="ignore"):
        host[5] = np.abs(np.log(min_p)).view(np.int32)  # of nothing it is endless
    host[6:].reshape(-1)[:] = noise_keys(sequences)
    return numbers


def _sample(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    keys: torch.Tensor,
    seats: torch.Tensor,
    last_tokens: torch.Tensor,
    sampled: torch.Tensor,
    filters: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
) -> None:
    """With `filters`: rows of `logits`, their likeliest logits and limits; else all rows in order."""
    num_rows, vocab_size = len(temperatures), logits.shape[1]
    row_ids, best_logits, limits = (seats, seats, seats) if filters is None else filters
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
        row_ids,
        best_logits,
        limits,
        logits.stride(0),
        vocab_size,
        num_parts,
        BLOCK=BLOCK_VOCAB,
        IS_FILTERED=filters is not None,
        num_warps=8,
    )
    _choose_kernel[(num_rows,)](
        part_values,
        part_ids,
        part_flags,
        row_ids,
        seats,
        last_tokens,
        sampled,
        num_parts,
        IS_FILTERED=filters is not None,
        BLOCK=triton.next_power_of_2(num_parts),
        num_warps=4,
    )
