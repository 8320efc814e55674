"""Passes for the batch-invariant mode: every row is computed in a shape that its own context length decides.

A fused call computes each (row, head) alone, so equal shapes give equal bits: neighbours in the batch, the
cut of a prompt into chunks and a cached prefix change nothing. Prefill pays with smaller matrices.
"""

from __future__ import annotations

from itertools import groupby

import torch

from longshore_server.native.attention.kv_cache import PagedKVCache
from longshore_server.native.attention.layout import BatchLayout, Span
from longshore_server.native.attention.reference import (
    GROUP_KEY_BYTES,
    AttentionPass,
    GroupPass,
    first_visible,
    padded_table,
    visibility_mask,
)

# Contexts are read in whole multiples of this many tokens (rounded up to whole blocks).
TILE_TOKENS = 64


def plan_invariant_passes(
    layout: BatchLayout, window: int | None, cache: PagedKVCache
) -> list[AttentionPass]:
    """Groups of consecutive rows that read equally many tiles; one sequence's rows share its pages."""
    passes: list[AttentionPass] = []
    for num_tiles, same in groupby(layout.decodes, key=lambda s: _num_tiles(s.context_len, window, cache)):
        spans = list(same)
        group_size = max(
            1, GROUP_KEY_BYTES // (num_tiles * _tile_blocks(cache) * cache.block_size * cache.key_token_bytes)
        )
        for index in range(0, len(spans), group_size):
            passes.append(_plan_rows(spans[index : index + group_size], num_tiles, window, cache))
    for span in layout.prefills:
        passes += _plan_prefill(span, window, cache)
    return passes


def _plan_rows(spans: list[Span], num_tiles: int, window: int | None, cache: PagedKVCache) -> GroupPass:
    """One row each of several sequences."""
    tile_tokens = _tile_blocks(cache) * cache.block_size
    firsts = [_first_tile(span.context_len, window, cache) for span in spans]
    tables = [_table(span, first, num_tiles, cache) for span, first in zip(spans, firsts, strict=True)]
    ends = [span.context_len - first * tile_tokens for span, first in zip(spans, firsts, strict=True)]
    rows = slice(spans[0].first_row, spans[0].first_row + len(spans))
    return _group_pass(rows, tables, ends, window, cache)


def _plan_prefill(span: Span, window: int | None, cache: PagedKVCache) -> list[AttentionPass]:
    """Consecutive rows of one sequence that read the same tiles go together."""
    tile_tokens = _tile_blocks(cache) * cache.block_size
    start = span.context_len - span.num_rows
    passes: list[AttentionPass] = []
    lengths = range(start + 1, span.context_len + 1)
    for (first, num_tiles), same in groupby(
        lengths, key=lambda n: (_first_tile(n, window, cache), _num_tiles(n, window, cache))
    ):
        context_lens = list(same)
        row = span.first_row + context_lens[0] - 1 - start
        ends = [context_len - first * tile_tokens for context_len in context_lens]
        table = _table(span, first, num_tiles, cache)
        passes.append(_group_pass(slice(row, row + len(ends)), [table], ends, window, cache))
    return passes


def _group_pass(
    rows: slice, tables: list[list[int]], ends: list[int], window: int | None, cache: PagedKVCache
) -> GroupPass:
    columns = torch.arange(len(tables[0]) * cache.block_size)
    mask = visibility_mask(torch.tensor(ends)[:, None], columns, window, cache)
    return GroupPass(rows, torch.tensor(tables, device=cache.device), mask[:, None, None, :])


def _tile_blocks(cache: PagedKVCache) -> int:
    return -(-TILE_TOKENS // cache.block_size)


def _first_tile(context_len: int, window: int | None, cache: PagedKVCache) -> int:
    return first_visible(context_len - 1, window) // (_tile_blocks(cache) * cache.block_size)


def _num_tiles(context_len: int, window: int | None, cache: PagedKVCache) -> int:
    tile_tokens = _tile_blocks(cache) * cache.block_size
    return -(-context_len // tile_tokens) - _first_tile(context_len, window, cache)


def _table(span: Span, first_tile: int, num_tiles: int, cache: PagedKVCache) -> list[int]:
    blocks = _tile_blocks(cache)
    return padded_table(span, first_tile * blocks, num_tiles * blocks, cache)
