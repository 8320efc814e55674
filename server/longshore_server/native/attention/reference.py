"""Paged attention in plain torch: the oracle for kernels, and the path that serves on a CPU.

A step's rows are cut into passes, each one fused attention call over gathered pages: decode rows in padded
groups, prefill chunks one by one. It allocates no blocks and decides no order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention

from longshore_server.native.attention.kv_cache import PagedKVCache
from longshore_server.native.attention.layout import BatchLayout, Span

# A group's gathered keys should stay in a core's own cache between gathering and attending.
GROUP_KEY_BYTES = 1024 * 1024


class AttentionPass(Protocol):
    """One attention call for the rows `rows`; the same for every layer with one window."""

    @property
    def rows(self) -> slice: ...

    def attend(
        self,
        query: torch.Tensor,  # [rows, num_heads, head_dim]
        key: torch.Tensor,  # [rows, num_kv_heads, head_dim], of these rows alone
        value: torch.Tensor,
        key_pages: torch.Tensor,  # [num_blocks + 1, block_size, num_kv_heads, head_dim]
        value_pages: torch.Tensor,
        scale: float,
    ) -> torch.Tensor: ...  # [rows, num_heads, value_dim]


Planner = Callable[[BatchLayout, int | None, PagedKVCache], list[AttentionPass]]


class ReferenceContext:
    """An attention context over a PagedKVCache for one step; `plan` cuts the rows into passes."""

    def __init__(self, cache: PagedKVCache, layout: BatchLayout, plan: Planner) -> None:
        self.cache = cache
        self.layout = layout
        self.slots = torch.tensor(layout.slots(), device=cache.device)
        self._plan = plan
        self._passes: dict[int | None, list[AttentionPass]] = {}

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
        """Writes the rows' keys and values, then attends; shapes as in AttentionContext."""
        self.write(layer_index, key, value)
        return self.attend_written(layer_index, query, key, value, scale, window)

    def write(self, layer_index: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Puts the rows' keys and values into their places in the cache."""
        self.cache.keys[layer_index].flatten(0, 1).index_copy_(0, self.slots, key)
        self.cache.values[layer_index].flatten(0, 1).index_copy_(0, self.slots, value)

    def attend_written(
        self,
        layer_index: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        """Attends the layout's rows; whatever rows it lacks have no meaning in the output."""
        if window not in self._passes:
            self._passes[window] = self._plan(self.layout, window, self.cache)
        pages = self.cache.keys[layer_index], self.cache.values[layer_index]
        return run_passes(self._passes[window], query, key, value, *pages, scale)


def run_passes(
    passes: list[AttentionPass],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """[tokens, num_heads, value_dim], with the rows of the passes filled."""
    if len(passes) == 1 and passes[0].rows == slice(0, len(query)):
        return passes[0].attend(query, key, value, key_pages, value_pages, scale)
    output = query.new_empty(*query.shape[:2], value.shape[2])
    for one in passes:
        rows = one.rows
        output[rows] = one.attend(query[rows], key[rows], value[rows], key_pages, value_pages, scale)
    return output


def plan_passes(layout: BatchLayout, window: int | None, cache: PagedKVCache) -> list[AttentionPass]:
    """Decodes in groups of similar length, then each prefill chunk."""
    passes: list[AttentionPass] = [
        plan_group(group, window, cache) for group in _group_decodes(layout, window, cache.key_token_bytes)
    ]
    for span in layout.prefills:
        is_fresh = span.num_rows == span.context_len and (window is None or span.num_rows <= window)
        passes.append(FreshPass(_rows(span)) if is_fresh else plan_chunk(span, window, cache))
    return passes


# --- decode rows ---


@dataclass(frozen=True, slots=True)
class GroupPass:
    """One query row per sequence, or several rows over the pages of one sequence (`blocks` [1, n])."""

    rows: slice
    blocks: torch.Tensor  # [sequences, blocks per sequence]
    mask: torch.Tensor  # [rows, 1, 1, tokens], additive

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_pages: torch.Tensor,
        value_pages: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """The heads of a KV group become rows of one matrix, so no key is repeated."""
        num_rows, num_heads, head_dim = query.shape
        grouped = query.reshape(num_rows, key.shape[1], -1, head_dim)  # [rows, num_kv_heads, group, head_dim]
        keys, values = gather(key_pages, self.blocks), gather(value_pages, self.blocks)
        if keys.shape[0] != num_rows:
            keys, values = keys.expand(num_rows, -1, -1, -1), values.expand(num_rows, -1, -1, -1)
        output = scaled_dot_product_attention(grouped, keys, values, attn_mask=self.mask, scale=scale)
        return output.reshape(num_rows, num_heads, value.shape[2])


def _group_decodes(layout: BatchLayout, window: int | None, token_bytes: int) -> list[list[Span]]:
    """Splits the decodes, shortest first, so that each group's padded keys fit GROUP_KEY_BYTES."""
    groups: list[list[Span]] = []
    max_tokens = max(1, GROUP_KEY_BYTES // token_bytes)
    for span in layout.decodes:
        num_tokens = span.context_len if window is None else min(span.context_len, window)
        if not groups or (len(groups[-1]) + 1) * num_tokens > max_tokens:
            groups.append([])
        groups[-1].append(span)
    return groups


def plan_group(spans: list[Span], window: int | None, cache: PagedKVCache) -> GroupPass:
    """A pass over consecutive decode rows, padded to the longest of them."""
    size = cache.block_size
    firsts = [first_visible(span.context_len - 1, window) // size for span in spans]
    lasts = [-(-span.context_len // size) for span in spans]
    num_blocks = max(last - first for first, last in zip(firsts, lasts, strict=True))
    tables = [padded_table(span, first, num_blocks, cache) for span, first in zip(spans, firsts, strict=True)]
    # [rows, 1]: where each row's context ends, counted from its first gathered block
    ends = torch.tensor([span.context_len - first * size for span, first in zip(spans, firsts, strict=True)])
    mask = visibility_mask(ends[:, None], torch.arange(num_blocks * size), window, cache)
    rows = slice(spans[0].first_row, spans[0].first_row + len(spans))
    return GroupPass(rows, torch.tensor(tables, device=cache.device), mask[:, None, None, :])


# --- prefill chunks ---


@dataclass(frozen=True, slots=True)
class FreshPass:
    """A chunk that is its sequence's whole context, within the window: it needs neither pages nor mask."""

    rows: slice

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_pages: torch.Tensor,
        value_pages: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        output = scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            key.transpose(0, 1)[None],
            value.transpose(0, 1)[None],
            is_causal=True,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return output[0].transpose(0, 1)


@dataclass(frozen=True, slots=True)
class ChunkPass:
    """A chunk of one sequence that reads earlier tokens from the pages."""

    rows: slice
    blocks: torch.Tensor  # [1, blocks]
    mask: torch.Tensor  # [rows, tokens], additive

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_pages: torch.Tensor,
        value_pages: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        output = scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            gather(key_pages, self.blocks),
            gather(value_pages, self.blocks),
            attn_mask=self.mask,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return output[0].transpose(0, 1)


def plan_chunk(span: Span, window: int | None, cache: PagedKVCache) -> ChunkPass:
    size = cache.block_size
    start = span.context_len - span.num_rows
    first = first_visible(start, window) // size
    last = -(-span.context_len // size)
    ends = torch.arange(start + 1, span.context_len + 1)[:, None]
    mask = visibility_mask(ends, torch.arange(first * size, last * size), window, cache)
    blocks = torch.tensor([span.block_table[first:last]], device=cache.device)
    return ChunkPass(_rows(span), blocks, mask)


# --- pages and masks ---


def first_visible(position: int, window: int | None) -> int:
    """The first token that a row at `position` sees."""
    return 0 if window is None else max(0, position - window + 1)


def padded_table(span: Span, first_block: int, num_blocks: int, cache: PagedKVCache) -> list[int]:
    table = list(span.block_table[first_block : first_block + num_blocks])
    return table + [cache.padding_block] * (num_blocks - len(table))


def visibility_mask(
    ends: torch.Tensor, columns: torch.Tensor, window: int | None, cache: PagedKVCache
) -> torch.Tensor:
    """Additive mask [rows, columns]: a row sees the `window` columns before its `ends` [rows, 1]."""
    hidden = columns >= ends
    if window is not None:
        hidden |= columns < ends - window
    mask = torch.zeros(hidden.shape, dtype=cache.dtype).masked_fill_(hidden, float("-inf"))
    return mask.to(cache.device)


def gather(pages: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """The pages of `blocks` [sequences, n] as [sequences, num_kv_heads, tokens, dim]."""
    gathered = pages.index_select(0, blocks.flatten())  # [sequences * n, block_size, num_kv_heads, dim]
    return gathered.view(blocks.shape[0], -1, *pages.shape[2:]).transpose(1, 2)


def _rows(span: Span) -> slice:
    return slice(span.first_row, span.first_row + span.num_rows)
