"""Local and global sparse attention: picks the pages that each generated token sees, for each KV head.

Prompts attend densely. The result of a pick is a shorter table of the same cache, which dense attention reads
as it reads any other; keys carry their positions already, so leaving pages out moves nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from longshore_server.native.attention.fp8_reference import Fp8Context
from longshore_server.native.attention.kv_cache import PagedKVCache, as_bytes, from_fp8
from longshore_server.native.attention.layout import BatchLayout, Span
from longshore_server.native.attention.page_bounds import PageBounds
from longshore_server.native.attention.reference import GROUP_KEY_BYTES, ReferenceContext
from longshore_server.native.attention.sparsity import Sparsity

MakeDense = Callable[[PagedKVCache, BatchLayout], ReferenceContext | Fp8Context]


@dataclass(frozen=True, slots=True)
class SparseRows:
    """The rows of one step that attend sparsely: where they stand, how far they see, their pages."""

    rows: torch.Tensor  # [rows] of the flat batch
    context_lens: torch.Tensor  # [rows]
    tables: torch.Tensor  # [rows, pages], padded


class SparseContext:
    """An attention context for one step in torch, whose decodes may be sparse."""

    def __init__(
        self,
        cache: PagedKVCache,
        layout: BatchLayout,
        *,
        make_dense: MakeDense,
        sparsity: Sparsity,
        bounds: PageBounds,
    ) -> None:
        self._cache, self._sparsity, self._bounds = cache, sparsity, bounds
        self._dense = make_dense(cache, layout)
        beside, self._sparse = split_layout(layout, sparsity, cache)
        self._beside_sparse = make_dense(cache, beside) if beside.num_rows else None
        self._touched = torch.tensor(touched_blocks(layout), device=cache.device)
        self._fixed_picks = self._pick_fixed()

    def check_arguments(self, arguments: dict[str, Any], attention_mask: torch.Tensor | None) -> None:
        """Nothing to check: the probe has seen this model's arguments."""

    def attend(
        self,
        layer_index: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        """As AttentionContext; layers with a window of their own are local already and stay as they are."""
        if window is not None or layer_index in self._sparsity.dense_layers:
            return self._dense.attend(layer_index, query, key, value, scale, window)
        self._dense.write(layer_index, key, value)
        self._bounds.update(layer_index, self._touched)
        if self._beside_sparse is None:
            output = query.new_empty(*query.shape[:2], value.shape[2])
        else:
            output = self._beside_sparse.attend_written(layer_index, query, key, value, scale, None)
        if self._sparse is not None:
            output[self._sparse.rows] = self._attend_sparse(layer_index, query, self._sparse, scale)
        return output

    def _attend_sparse(
        self, layer: int, query: torch.Tensor, sparse: SparseRows, scale: float
    ) -> torch.Tensor:
        rows, page_tokens = query[sparse.rows], self._cache.block_size
        picks = self._fixed_picks
        if picks is None:
            picks = pick_pages(layer, rows, sparse, self._sparsity, self._bounds, page_tokens, scale)
        slots, lens = slot_tables(picks, sparse, page_tokens, self._cache.keys[layer].shape[2])
        return attend_slots(rows, self._cache, layer, slots, lens, scale)

    def _pick_fixed(self) -> torch.Tensor | None:
        """Sink and window do not depend on the query: picked once for all layers."""
        if self._sparse is None or self._sparsity.top_pages:
            return None
        scores = torch.zeros(
            len(self._sparse.rows), 1, self._sparse.tables.shape[1], device=self._cache.device
        )
        return best_pages(scores, self._sparse, self._sparsity, self._cache.block_size)


# --- which rows ---


def split_layout(
    layout: BatchLayout, sparsity: Sparsity, cache: PagedKVCache
) -> tuple[BatchLayout, SparseRows | None]:
    """The rows that attend densely as a layout, and the others: generated tokens with a long context.

    Prefills must be dense; generated tokens that are computed again come as decodes, too.
    """
    beside = BatchLayout([], [], layout.block_size)
    sparse: list[Span] = []
    for span in layout.decodes:
        if span.context_len > sparsity.first_position(span.num_prompt_tokens):
            sparse.append(span)
        else:  # decodes are consecutive rows; one behind a sparse row is computed as a chunk is
            (beside.prefills if sparse else beside.decodes).append(span)
    beside.prefills.extend(layout.prefills)
    return beside, _sparse_rows(sparse, cache) if sparse else None


def _sparse_rows(spans: list[Span], cache: PagedKVCache) -> SparseRows:
    num_pages = max(-(-span.context_len // cache.block_size) for span in spans)
    tables = [list(span.block_table[:num_pages]) for span in spans]
    padded = [table + [cache.padding_block] * (num_pages - len(table)) for table in tables]
    return SparseRows(
        torch.tensor([span.first_row for span in spans], device=cache.device),
        torch.tensor([span.context_len for span in spans], device=cache.device),
        torch.tensor(padded, device=cache.device),
    )


def touched_blocks(layout: BatchLayout) -> list[int]:
    """The blocks that this step writes to."""
    size = layout.block_size
    return [
        block
        for span in (*layout.decodes, *layout.prefills)
        for block in span.block_table[
            (span.context_len - span.num_rows) // size : -(-span.context_len // size)
        ]
    ]


# --- which pages ---


def pick_pages(
    layer: int,
    query: torch.Tensor,  # [rows, num_heads, key_dim]
    sparse: SparseRows,
    sparsity: Sparsity,
    bounds: PageBounds,
    page_tokens: int,
    scale: float,
) -> torch.Tensor:
    """Indexes into each row's table, ascending: [rows, num_kv_heads, picks].

    Heads of one KV head share a pick, since they read the same keys. Their bounds are added up as shares of
    each head's attention, so that a head with large scores does not choose for the others.
    """
    scores = bounds.scores(layer, query, sparse.tables) * scale
    is_candidate = _candidates(sparse, sparsity, page_tokens)[:, None, None, :]
    shares = scores.masked_fill(~is_candidate, float("-inf")).log_softmax(-1)
    return best_pages(shares.logsumexp(2), sparse, sparsity, page_tokens)


def best_pages(
    scores: torch.Tensor,  # [rows, num_kv_heads or 1, pages]
    sparse: SparseRows,
    sparsity: Sparsity,
    page_tokens: int,
) -> torch.Tensor:
    """The sink, the window and the best others; what a short context lacks is filled from behind its end."""
    page = torch.arange(scores.shape[2], device=scores.device)
    num_pages = _num_pages(sparse, page_tokens)
    is_missing = page >= num_pages
    is_fixed = ~_candidates(sparse, sparsity, page_tokens) & ~is_missing
    ranked = scores.nan_to_num(nan=float("-inf"))
    ranked = ranked.clamp(min=torch.finfo(ranked.dtype).min)  # below any page of the context, above none
    ranked = ranked.masked_fill(is_fixed[:, None, :], float("inf"))
    ranked = ranked.masked_fill(is_missing[:, None, :], float("-inf"))
    count = min(sparsity.num_pages(page_tokens), scores.shape[2])
    return ranked.topk(count, dim=2, sorted=False).indices.sort(dim=2).values


def _num_pages(sparse: SparseRows, page_tokens: int) -> torch.Tensor:
    return ((sparse.context_lens + page_tokens - 1) // page_tokens)[:, None]


def _candidates(sparse: SparseRows, sparsity: Sparsity, page_tokens: int) -> torch.Tensor:
    """[rows, pages]: the pages between sink and window, all of them full."""
    page = torch.arange(sparse.tables.shape[1], device=sparse.tables.device)
    window_start = _num_pages(sparse, page_tokens) - sparsity.num_window_pages(page_tokens)
    return (page >= sparsity.num_sink_pages(page_tokens)) & (page < window_start)


# --- the shorter tables ---


def slot_tables(
    picks: torch.Tensor,  # [rows, num_kv_heads or 1, picks]
    sparse: SparseRows,
    page_tokens: int,
    num_kv_heads: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tables over the cache seen as single keys, [rows * num_kv_heads, tokens], and lengths [rows].

    Seen so, slot (block * page_tokens + offset) * num_kv_heads + head is a page of one token and one head,
    and each KV head of a row may have pages of its own under any dense paged attention.
    """
    num_rows, _, count = picks.shape
    blocks = sparse.tables[:, None, :].expand(-1, picks.shape[1], -1).gather(2, picks)
    offsets = torch.arange(page_tokens, device=picks.device)
    tokens = (blocks[..., None] * page_tokens + offsets).flatten(2)  # [rows, heads or 1, tokens]
    heads = torch.arange(num_kv_heads, device=picks.device)
    slots = tokens * num_kv_heads + heads[:, None]
    is_whole = _num_pages(sparse, page_tokens)[:, 0] <= count
    shortened = (count - 1) * page_tokens + (sparse.context_lens - 1) % page_tokens + 1
    lens = torch.where(is_whole, sparse.context_lens, shortened)
    return slots.view(num_rows * num_kv_heads, -1), lens


def attend_slots(
    query: torch.Tensor,  # [rows, num_heads, key_dim]
    cache: PagedKVCache,
    layer: int,
    slots: torch.Tensor,  # [rows * num_kv_heads, tokens]
    lens: torch.Tensor,  # [rows]
    scale: float,
) -> torch.Tensor:
    """Dense attention over the slots, as many rows at a time as stay in a core's cache."""
    key_pages, value_pages = cache.keys[layer], cache.values[layer]
    scales = cache.scales[layer]
    num_rows, _, key_dim = query.shape
    num_kv_heads = key_pages.shape[2]
    tables = slots.view(num_rows, num_kv_heads, -1)
    grouped = query.reshape(num_rows, num_kv_heads, -1, key_dim)
    columns = torch.arange(tables.shape[2], device=slots.device)
    step = max(1, GROUP_KEY_BYTES // (tables[0].numel() * key_pages[0, 0, 0].nbytes))
    outputs = []
    for first in range(0, num_rows, step):
        rows = slice(first, first + step)
        keys = _gather(key_pages, tables[rows], scales.key, query.dtype)
        values = _gather(value_pages, tables[rows], scales.value, query.dtype)
        mask = (columns < lens[rows, None])[:, None, None, :]
        outputs.append(scaled_dot_product_attention(grouped[rows], keys, values, attn_mask=mask, scale=scale))
    return torch.cat(outputs).reshape(num_rows, query.shape[1], value_pages.shape[3])


def _gather(
    pages: torch.Tensor, slots: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """[rows, num_kv_heads, tokens, dim] of the single keys that `slots` names; `scale` is of an FP8 cache."""
    dim = pages.shape[3]
    rows = as_bytes(pages).view(-1, dim).index_select(0, slots.flatten()).view(pages.dtype)
    rows = rows.view(*slots.shape, dim)
    return from_fp8(rows, scale[:, None], dtype) if pages.dtype.itemsize == 1 else rows
