"""Where top-k, top-p and min-p cut a row's tokens off, for many rows on the GPU and without a sort.

A token's distance below the likeliest one, over the temperature, is a float of zero or more, whose bits
order like integers. How many tokens, or how much probability, stand strictly nearer only grows with the
distance, so the last one that a filter keeps is found bit by bit, in a pass over the row for each bit.
Equal logits stand or fall together, as in `sampler`. It draws nothing and waits for nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK_VOCAB = 4096
NUM_BITS = 31  # of a float that is not negative


@triton.jit
def _distances(logits, tokens, vocab_size, best, temperature):
    """Of the likeliest logit, as bits; what is beyond the vocabulary is beyond every limit."""
    values = tl.load(logits + tokens, mask=tokens < vocab_size, other=float("-inf")).to(tl.float32)
    distances = (best - values) / temperature
    return tl.where(tokens < vocab_size, distances, float("inf"))


@triton.jit
def _limit_kernel(
    logits,
    row_ids,
    temperatures,
    top_ks,
    top_ps,
    first_limits,
    best_logits,
    limits,
    logits_stride,
    vocab_size,
    BLOCK: tl.constexpr,
    NUM_BITS: tl.constexpr,
):
    index = tl.program_id(0)
    row = logits + tl.load(row_ids + index) * logits_stride
    temperature = tl.load(temperatures + index).to(tl.float32)
    top_k = tl.load(top_ks + index)
    top_p = tl.load(top_ps + index).to(tl.float32)
    limit = tl.load(first_limits + index).to(tl.int32)
    lanes = tl.arange(0, BLOCK)

    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        tokens = start + lanes
        values = tl.load(row + tokens, mask=tokens < vocab_size, other=float("-inf")).to(tl.float32)
        highest = tl.maximum(highest, values)
    best = tl.max(highest, 0)

    if top_k < vocab_size:
        kept = 0
        for bit in range(NUM_BITS):
            tried = kept | (1 << (NUM_BITS - 1 - bit))
            nearer = tl.zeros([BLOCK], tl.int32)
            for start in range(0, vocab_size, BLOCK):
                distances = _distances(row, start + lanes, vocab_size, best, temperature)
                nearer += (distances.to(tl.int32, bitcast=True) < tried).to(tl.int32)
            kept = tl.where(tl.sum(nearer, 0) < top_k, tried, kept)
        limit = tl.minimum(limit, kept)

    if top_p < 1.0:
        mass = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocab_size, BLOCK):
            distances = _distances(row, start + lanes, vocab_size, best, temperature)
            is_in = distances.to(tl.int32, bitcast=True) <= limit
            mass += tl.where(is_in, tl.exp(-distances), 0.0)
        share = top_p * tl.sum(mass, 0)
        kept = 0
        for bit in range(NUM_BITS):
            tried = kept | (1 << (NUM_BITS - 1 - bit))
            nearer_mass = tl.zeros([BLOCK], tl.float32)
            for start in range(0, vocab_size, BLOCK):
                distances = _distances(row, start + lanes, vocab_size, best, temperature)
                bits = distances.to(tl.int32, bitcast=True)
                is_nearer = (bits < tried) & (bits <= limit)
                nearer_mass += tl.where(is_nearer, tl.exp(-distances), 0.0)
            kept = tl.where(tl.sum(nearer_mass, 0) < share, tried, kept)
        limit = tl.minimum(limit, kept)

    tl.store(best_logits + index, best)
    tl.store(limits + index, limit)


def filter_limits(
    logits: torch.Tensor,  # [rows, vocab]
    row_ids: torch.Tensor,  # [filtered] int64: rows of `logits`
    temperatures: torch.Tensor,  # [filtered] float64, above 0
    top_ks: torch.Tensor,  # [filtered] int64; the vocabulary or more for none
    top_ps: torch.Tensor,  # [filtered] float64; 1 for none
    first_limits: torch.Tensor,  # [filtered] int64: bits of the greatest distance that min-p keeps
) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest logit [filtered] of each row, and the bits [filtered] of the greatest distance kept."""
    num_rows, vocab_size = len(row_ids), logits.shape[1]
    best = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    limits = torch.empty(num_rows, dtype=torch.int32, device=logits.device)
    _limit_kernel[(num_rows,)](
        logits,
        row_ids,
        temperatures,
        top_ks,
        top_ps,
        first_limits,
        best,
        limits,
        logits.stride(0),
        vocab_size,
        BLOCK=BLOCK_VOCAB,
        NUM_BITS=NUM_BITS,
        num_warps=16,
    )
    return best, limits
