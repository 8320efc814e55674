"""Which pages a generated token sees, chosen on a GPU: bounds of full pages, scores, the best of them.

The same choice as in attention/sparse.py, without a number that the host must know: a captured graph can hold
it, whatever the contexts are. Bounds and scores are Quest's (arXiv 2406.10774).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from longshore_server.native.attention.interface import DecodeRows, PickedPages
from longshore_server.native.attention.page_bounds import PageBounds
from longshore_server.native.attention.sparsity import Sparsity
from longshore_server.native.attention.triton_tiles import dot_precision, tile_side

SCORED_PAGES = 64  # of one program
MAX_SCORE_BYTES = 64 << 20  # rows are chosen for in groups whose scores take so much
# Below any score, and finite, since it is subtracted from itself.
LOWEST = tl.constexpr(-1e30)


class PagePicker:
    """Keeps `bounds` and picks by them. It holds nothing of a step: steps may be captured beside others."""

    def __init__(self, sparsity: Sparsity, bounds: PageBounds) -> None:
        self._sparsity, self._bounds = sparsity, bounds

    def note_written(self, layer: int, slots: torch.Tensor) -> None:
        """Takes in the pages whose last token's key a step has written into one of `slots`."""
        if layer in self._bounds.lowest:
            bound_full_pages(
                self._bounds.cache.keys[layer],
                slots,
                self._bounds.lowest[layer],
                self._bounds.highest[layer],
            )

    def pick(
        self,
        layer: int,
        query: torch.Tensor,  # [rows, num_heads, key_dim]
        tables: torch.Tensor,  # [table rows, blocks] int32
        rows: DecodeRows,
        scale: float,
        window: int | None,
    ) -> PickedPages | None:
        """None where the layer sees everything, or has a window of its own."""
        sparsity, page_tokens = self._sparsity, self._bounds.cache.block_size
        if window is not None or layer in sparsity.dense_layers:
            return None
        num_rows, num_kv_heads = len(query), self._bounds.cache.keys[layer].shape[2]
        width = min(sparsity.num_pages(page_tokens), tables.shape[1])
        picked = PickedPages(
            torch.empty(num_rows, num_kv_heads, width, dtype=torch.int32, device=query.device),
            torch.empty(num_rows, dtype=torch.int64, device=query.device),
        )
        size = max(1, MAX_SCORE_BYTES // (4 * query.shape[1] * tables.shape[1]))
        for first in range(0, num_rows, size):
            group = slice(first, first + size)
            scores = None
            if sparsity.top_pages:
                scores = self._scores(layer, query[group], tables, rows[group], scale)
            choose_pages(scores, tables, rows[group], sparsity, page_tokens, picked[group])
        return picked

    def _scores(
        self, layer: int, query: torch.Tensor, tables: torch.Tensor, rows: DecodeRows, scale: float
    ) -> torch.Tensor:
        cache, bounds = self._bounds.cache, self._bounds
        return score_pages(
            query,
            bounds.lowest[layer],
            bounds.highest[layer],
            tables,
            rows,
            self._sparsity,
            cache.block_size,
            scale,
            cache.scales[layer].key,
        )


def page_picker(sparsity: Sparsity | None, bounds: PageBounds | None) -> PagePicker | None:
    return None if sparsity is None or bounds is None else PagePicker(sparsity, bounds)


# --- bounds ---


@triton.jit
def _bounds_kernel(
    key_pages,
    slots,
    lowest,
    highest,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
):
    slot = tl.load(slots + tl.program_id(0))
    if slot < 0 or slot % BLOCK_SIZE != BLOCK_SIZE - 1:
        return
    kv_head = tl.program_id(1)
    block = slot // BLOCK_SIZE
    tokens = tl.arange(0, BLOCK_TOKENS)
    dims = tl.arange(0, BLOCK_KEY)
    places = ((block * BLOCK_SIZE + tokens[:, None]) * NUM_KV_HEADS + kv_head) * KEY_DIM + dims[None, :]
    mask = (tokens[:, None] < BLOCK_SIZE) & (dims[None, :] < KEY_DIM)
    keys = tl.load(key_pages + places, mask=mask, other=0.0).to(tl.float32)
    low = tl.min(tl.where(mask, keys, float("inf")), 0)
    high = tl.max(tl.where(mask, keys, float("-inf")), 0)
    bound = (block * NUM_KV_HEADS + kv_head) * KEY_DIM + dims
    tl.store(lowest + bound, low.to(lowest.dtype.element_ty), mask=dims < KEY_DIM)
    tl.store(highest + bound, high.to(highest.dtype.element_ty), mask=dims < KEY_DIM)


def bound_full_pages(
    key_pages: torch.Tensor,  # [blocks, block_size, num_kv_heads, key_dim]
    slots: torch.Tensor,  # [rows] int64, where the rows' keys have been written; negative for none
    lowest: torch.Tensor,  # [blocks, num_kv_heads, key_dim]
    highest: torch.Tensor,
) -> None:
    """Writes the bounds of each page whose last slot is among `slots`: it is full, and no other is ranked."""
    _, block_size, num_kv_heads, key_dim = key_pages.shape
    _bounds_kernel[(len(slots), num_kv_heads)](
        key_pages,
        slots,
        lowest,
        highest,
        BLOCK_SIZE=block_size,
        BLOCK_TOKENS=triton.next_power_of_2(block_size),
        NUM_KV_HEADS=num_kv_heads,
        KEY_DIM=key_dim,
        BLOCK_KEY=triton.next_power_of_2(key_dim),
        num_warps=1,
    )


# --- scores ---


@triton.jit
def _sees_all(context, prompt_lens, row, dense_below):
    """Whether the row's token is before Sparsity.first_position()."""
    return context <= tl.maximum(tl.load(prompt_lens + row), dense_below)


@triton.jit
def _scores_kernel(
    query,
    lowest,
    highest,
    tables,
    table_rows,
    context_lens,
    prompt_lens,
    key_scales,
    scores,
    scale,
    dense_below,
    table_stride,
    query_stride_row,
    query_stride_head,
    scores_stride,
    BLOCK_SIZE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    BLOCK_PAGES: tl.constexpr,
    NUM_SINK: tl.constexpr,
    NUM_WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    context = tl.load(context_lens + row)
    if _sees_all(context, prompt_lens, row, dense_below):
        return
    num_candidates = tl.cdiv(context, BLOCK_SIZE).to(tl.int32) - NUM_WINDOW - NUM_SINK
    candidates = tl.program_id(2) * BLOCK_PAGES + tl.arange(0, BLOCK_PAGES)
    if tl.program_id(2) * BLOCK_PAGES >= num_candidates:
        return
    is_there = candidates < num_candidates
    table = tables + tl.load(table_rows + row) * table_stride
    blocks = tl.load(table + NUM_SINK + candidates, mask=is_there, other=0).to(tl.int64)
    groups = tl.arange(0, BLOCK_GROUP)
    dims = tl.arange(0, BLOCK_KEY)
    heads = kv_head * GROUP + groups
    query_mask = (groups[:, None] < GROUP) & (dims[None, :] < KEY_DIM)
    query_places = heads[:, None] * query_stride_head + dims[None, :]
    q = tl.load(query + row.to(tl.int64) * query_stride_row + query_places, mask=query_mask, other=0.0)
    bound_places = (blocks * NUM_KV_HEADS + kv_head)[None, :] * KEY_DIM + dims[:, None]
    bound_mask = is_there[None, :] & (dims[:, None] < KEY_DIM)
    high = tl.load(highest + bound_places, mask=bound_mask, other=0.0).to(q.dtype)
    low = tl.load(lowest + bound_places, mask=bound_mask, other=0.0).to(q.dtype)
    zero = tl.zeros_like(q)
    best = tl.dot(tl.where(q > zero, q, zero), high, input_precision=PRECISION)
    best = tl.dot(tl.where(q < zero, q, zero), low, best, input_precision=PRECISION)
    best *= scale * tl.load(key_scales + kv_head)
    head_index = row.to(tl.int64) * (NUM_KV_HEADS * GROUP) + heads
    places = scores + head_index[:, None] * scores_stride + candidates[None, :]
    tl.store(places, best, mask=(groups[:, None] < GROUP) & is_there[None, :])


def score_pages(
    query: torch.Tensor,  # [rows, num_heads, key_dim]
    lowest: torch.Tensor,  # [blocks, num_kv_heads, key_dim]
    highest: torch.Tensor,
    tables: torch.Tensor,  # [table rows, blocks] int32
    rows: DecodeRows,
    sparsity: Sparsity,
    page_tokens: int,
    scale: float,
    key_scales: torch.Tensor,  # [num_kv_heads] float32, of the cache
) -> torch.Tensor:
    """The most that a key of each page between sink and window can score: [rows, num_heads, pages] float32.

    Only a sparse row's pages are filled in, from its first page behind the sink on.
    """
    num_rows, num_heads, key_dim = query.shape
    num_kv_heads = lowest.shape[1]
    num_sink, num_window = sparsity.num_sink_pages(page_tokens), sparsity.num_window_pages(page_tokens)
    num_pages = max(1, tables.shape[1] - num_sink - num_window)
    query = query if query.stride(2) == 1 else query.contiguous()
    scores = torch.empty(num_rows, num_heads, num_pages, dtype=torch.float32, device=query.device)
    group = num_heads // num_kv_heads
    _scores_kernel[(num_rows, num_kv_heads, triton.cdiv(num_pages, SCORED_PAGES))](
        query,
        lowest,
        highest,
        tables,
        rows.table_rows,
        rows.context_lens,
        rows.prompt_lens,
        key_scales,
        scores,
        scale,
        sparsity.dense_below_tokens,
        tables.stride(0),
        query.stride(0),
        query.stride(1),
        scores.stride(1),
        BLOCK_SIZE=page_tokens,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        BLOCK_GROUP=tile_side(group),
        KEY_DIM=key_dim,
        BLOCK_KEY=tile_side(key_dim),
        BLOCK_PAGES=SCORED_PAGES,
        NUM_SINK=num_sink,
        NUM_WINDOW=num_window,
        PRECISION=dot_precision(query.dtype),
        num_warps=4,
    )
    return scores


# --- the choice ---


@triton.jit
def _choose_kernel(
    scores,
    tables,
    table_rows,
    context_lens,
    prompt_lens,
    picked,
    picked_lens,
    dense_below,
    table_stride,
    scores_stride,
    picked_stride,
    BLOCK_SIZE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_SINK: tl.constexpr,
    NUM_TOP: tl.constexpr,
    NUM_WINDOW: tl.constexpr,
    BLOCK_CANDIDATES: tl.constexpr,
    BLOCK_PICKED: tl.constexpr,
    BLOCK_FIXED: tl.constexpr,
):
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    context = tl.load(context_lens + row)
    if _sees_all(context, prompt_lens, row, dense_below):
        tl.store(picked_lens + row, 0)
        return
    num_pages = tl.cdiv(context, BLOCK_SIZE).to(tl.int32)
    table = tables + tl.load(table_rows + row) * table_stride
    place = picked + (row.to(tl.int64) * NUM_KV_HEADS + kv_head) * picked_stride
    num_picked: tl.constexpr = NUM_SINK + NUM_TOP + NUM_WINDOW
    if num_pages <= num_picked:
        pages = tl.arange(0, BLOCK_PICKED)
        everything = tl.load(table + pages, mask=pages < num_pages, other=0)
        tl.store(place + pages, everything, mask=pages < num_pages)
        tl.store(picked_lens + row, context)
        return
    fixed = tl.arange(0, BLOCK_FIXED)
    sink = tl.load(table + fixed, mask=fixed < NUM_SINK, other=0)
    tl.store(place + fixed, sink, mask=fixed < NUM_SINK)
    in_window = tl.load(table + num_pages - NUM_WINDOW + fixed, mask=fixed < NUM_WINDOW, other=0)
    tl.store(place + NUM_SINK + NUM_TOP + fixed, in_window, mask=fixed < NUM_WINDOW)
    tl.store(picked_lens + row, (num_picked - 1) * BLOCK_SIZE + (context - 1) % BLOCK_SIZE + 1)
    if NUM_TOP > 0:
        pages = tl.arange(0, BLOCK_CANDIDATES)
        is_there = pages < num_pages - NUM_SINK - NUM_WINDOW
        shares = tl.full([BLOCK_CANDIDATES], LOWEST, tl.float32)  # log of the heads' shares, added up
        for head in range(GROUP):
            head_index = (row.to(tl.int64) * NUM_KV_HEADS + kv_head) * GROUP + head
            score = tl.load(scores + head_index * scores_stride + pages, mask=is_there, other=LOWEST)
            score = tl.where(score == score, score, LOWEST)
            most = tl.max(score, 0)
            share = score - most - tl.log(tl.sum(tl.exp(score - most), 0))
            larger = tl.maximum(shares, share)
            shares = larger + tl.log(tl.exp(shares - larger) + tl.exp(share - larger))
        # floats as unsigned numbers in the same order; 0 is none of them
        bits = shares.to(tl.uint32, bitcast=True)
        sign = bits >> 31
        order = tl.where(sign == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000)
        order = tl.where(is_there, order, 0)
        least = tl.full([], 0, tl.uint32)  # of the chosen ones, bit by bit
        one = tl.full([], 1, tl.uint32)
        for bit in range(32):
            trial = least | (one << (31 - bit))
            if tl.sum((order >= trial).to(tl.int32), 0) >= NUM_TOP:
                least = trial
        is_more = order > least
        is_equal = (order == least) & is_there
        num_equal = NUM_TOP - tl.sum(is_more.to(tl.int32), 0)
        is_chosen = is_more | (is_equal & (tl.cumsum(is_equal.to(tl.int32), 0) <= num_equal))
        rank = tl.cumsum(is_chosen.to(tl.int32), 0) - 1
        blocks = tl.load(table + NUM_SINK + pages, mask=is_chosen, other=0)
        tl.store(place + NUM_SINK + rank, blocks, mask=is_chosen)


def choose_pages(
    scores: torch.Tensor | None,  # as score_pages() gives them; None without top pages
    tables: torch.Tensor,  # [table rows, blocks] int32
    rows: DecodeRows,
    sparsity: Sparsity,
    page_tokens: int,
    picked: PickedPages,
) -> None:
    """Fills `picked`: the sink, the best pages in the order of the context, the window.

    Heads of one KV head share a pick, since they read the same keys; what is ranked is the sum of each head's
    shares. One program holds a row's candidates in registers: up to some 16,000 fit well.
    """
    num_rows, num_kv_heads, width = picked.tables.shape
    num_sink, num_window = sparsity.num_sink_pages(page_tokens), sparsity.num_window_pages(page_tokens)
    num_candidates = 1 if scores is None else scores.shape[2]
    block_candidates = triton.next_power_of_2(num_candidates)
    _choose_kernel[(num_rows, num_kv_heads)](
        picked.tables if scores is None else scores,
        tables,
        rows.table_rows,
        rows.context_lens,
        rows.prompt_lens,
        picked.tables,
        picked.lens,
        sparsity.dense_below_tokens,
        tables.stride(0),
        0 if scores is None else scores.stride(1),
        picked.tables.stride(1),
        BLOCK_SIZE=page_tokens,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=1 if scores is None else scores.shape[1] // num_kv_heads,
        NUM_SINK=num_sink,
        NUM_TOP=sparsity.top_pages,
        NUM_WINDOW=num_window,
        BLOCK_CANDIDATES=block_candidates,
        BLOCK_PICKED=triton.next_power_of_2(width),
        BLOCK_FIXED=triton.next_power_of_2(max(1, num_sink, num_window)),
        num_warps=min(16, max(1, block_candidates // 512)),
    )
