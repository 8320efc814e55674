"""Paged attention in plain torch: the oracle for kernels, and the path that serves on a CPU.

Decode rows are gathered into padded groups, each one fused attention call; prefill chunks go one by one.
It allocates no blocks and decides no order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from longshore_server.native.attention.kv_cache import PagedKVCache
from longshore_server.native.attention.layout import BatchLayout, Span

# A group's gathered keys should stay in a core's own cache between gathering and attending: measured best
# between 256 and 1024 KiB.
GROUP_KEY_BYTES = 512 * 1024


@dataclass(frozen=True, slots=True)
class GatherPlan:
    """Which blocks a group of spans reads, and which of the gathered tokens its rows see."""

    first_row: int
    num_rows: int
    num_sequences: int
    num_tokens: int  # gathered per sequence, a whole number of blocks
    blocks: torch.Tensor  # [num_sequences * num_tokens / block_size]
    mask: torch.Tensor | None  # additive, decode: [sequences, 1, 1, tokens]; prefill: [rows, tokens]


class ReferenceContext:
    """An attention context over a PagedKVCache for one step."""

    def __init__(self, cache: PagedKVCache, layout: BatchLayout) -> None:
        self.cache = cache
        self.layout = layout
        self.slots = torch.tensor(layout.slots(), device=cache.keys[0].device)
        self._plans: dict[int | None, tuple[list[GatherPlan], list[GatherPlan | None]]] = {}

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
        keys, values = self.cache.keys[layer_index], self.cache.values[layer_index]
        keys.flatten(0, 1).index_copy_(0, self.slots, key)
        values.flatten(0, 1).index_copy_(0, self.slots, value)
        decode_plans, prefill_plans = self._plans_for(window, keys)
        if len(decode_plans) == 1 and not prefill_plans:
            return _attend_decodes(decode_plans[0], query, keys, values, scale)
        output = query.new_empty(*query.shape[:2], value.shape[2])
        for plan in decode_plans:
            rows = slice(plan.first_row, plan.first_row + plan.num_rows)
            output[rows] = _attend_decodes(plan, query[rows], keys, values, scale)
        for span, prefill in zip(self.layout.prefills, prefill_plans, strict=True):
            rows = slice(span.first_row, span.first_row + span.num_rows)
            if prefill is None:
                output[rows] = _attend_fresh(query[rows], key[rows], value[rows], scale)
            else:
                output[rows] = _attend_chunk(prefill, query[rows], keys, values, scale)
        return output

    def _plans_for(
        self, window: int | None, keys: torch.Tensor
    ) -> tuple[list[GatherPlan], list[GatherPlan | None]]:
        """Plans are the same for all layers with one window."""
        if window not in self._plans:
            token_bytes = keys[0, 0].nbytes
            decodes = [
                _plan_decodes(group, window, self.cache, keys)
                for group in _group_decodes(self.layout, window, token_bytes)
            ]
            prefills = [_plan_prefill(span, window, self.cache, keys) for span in self.layout.prefills]
            self._plans[window] = (decodes, prefills)
        return self._plans[window]


def _first_visible_block(first_position: int, window: int | None, block_size: int) -> int:
    return 0 if window is None else max(0, first_position - window + 1) // block_size


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


def _plan_decodes(
    spans: list[Span], window: int | None, cache: PagedKVCache, keys: torch.Tensor
) -> GatherPlan:
    size = cache.block_size
    firsts = [_first_visible_block(span.context_len - 1, window, size) for span in spans]
    lasts = [-(-span.context_len // size) for span in spans]
    num_blocks = max(last - first for first, last in zip(firsts, lasts, strict=True))
    tables = [
        [*span.block_table[first:last], *[cache.padding_block] * (num_blocks - last + first)]
        for span, first, last in zip(spans, firsts, lasts, strict=True)
    ]
    blocks = torch.tensor(tables, device=keys.device).flatten()
    num_tokens = num_blocks * size
    # [sequences, 1]: visible tokens are those from `low` up to `high`, counted from the first gathered block
    high = torch.tensor(
        [span.context_len - first * size for span, first in zip(spans, firsts, strict=True)],
        device=keys.device,
    )[:, None]
    column = torch.arange(num_tokens, device=keys.device)
    hidden = column >= high
    if window is not None:
        hidden |= column < high - window
    mask = _additive(hidden, keys.dtype)[:, None, None, :]
    return GatherPlan(spans[0].first_row, len(spans), len(spans), num_tokens, blocks, mask)


def _plan_prefill(
    span: Span, window: int | None, cache: PagedKVCache, keys: torch.Tensor
) -> GatherPlan | None:
    """None for a chunk that is the whole context and fits the window: it needs no cache and no mask."""
    if span.num_rows == span.context_len and (window is None or span.num_rows <= window):
        return None
    size = cache.block_size
    start = span.context_len - span.num_rows
    first = _first_visible_block(start, window, size)
    last = -(-span.context_len // size)
    blocks = torch.tensor(span.block_table[first:last], device=keys.device)
    column = torch.arange(first * size, last * size, device=keys.device)
    row = torch.arange(start, span.context_len, device=keys.device)[:, None]
    hidden = column > row
    if window is not None:
        hidden |= column <= row - window
    mask = _additive(hidden, keys.dtype)
    return GatherPlan(span.first_row, span.num_rows, 1, (last - first) * size, blocks, mask)


def _additive(hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))


def _gather(plan: GatherPlan, pages: torch.Tensor) -> torch.Tensor:
    """Pages of a plan as [sequences, num_kv_heads, tokens, dim]."""
    gathered = pages.index_select(0, plan.blocks)  # [blocks, block_size, num_kv_heads, dim]
    return gathered.view(plan.num_sequences, plan.num_tokens, *pages.shape[2:]).transpose(1, 2)


def _attend_decodes(
    plan: GatherPlan, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> torch.Tensor:
    """One query row per sequence; the heads of a KV group are rows of one matrix, so no key is repeated."""
    num_rows, num_heads, head_dim = query.shape
    grouped = query.reshape(num_rows, keys.shape[2], -1, head_dim)  # [rows, num_kv_heads, group, head_dim]
    output = scaled_dot_product_attention(
        grouped, _gather(plan, keys), _gather(plan, values), attn_mask=plan.mask, scale=scale
    )
    return output.reshape(num_rows, num_heads, values.shape[3])


def _attend_chunk(
    plan: GatherPlan, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> torch.Tensor:
    output = scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        _gather(plan, keys),
        _gather(plan, values),
        attn_mask=plan.mask,
        scale=scale,
        enable_gqa=query.shape[1] != keys.shape[2],
    )
    return output[0].transpose(0, 1)


def _attend_fresh(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    output = scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        is_causal=True,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output[0].transpose(0, 1)
