"""Sequences over one layer's paged cache, and what their rows see of it under a sparsity, by definition."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from longshore_server.native.attention.interface import AttentionContext
from longshore_server.native.attention.kv_cache import LayerGeometry, PagedKVCache, from_fp8, to_fp8
from longshore_server.native.attention.layout import BatchLayout, Span
from longshore_server.native.attention.page_bounds import PageBounds
from longshore_server.native.attention.sparsity import Sparsity

SCALE = 0.3
MakeContext = Callable[[PagedKVCache, BatchLayout, Sparsity, PageBounds], AttentionContext]


@dataclass(frozen=True)
class Rows:
    """The next `num_rows` of a sequence, up to its `context_len` tokens; `prompt_len` are its prompt."""

    num_rows: int
    context_len: int
    prompt_len: int


class SparseBatch:
    """Sequences with known keys and values; the tokens before their rows were written by earlier steps."""

    def __init__(
        self,
        sequences: Sequence[Rows],
        heads: tuple[int, int],  # query heads, KV heads
        *,
        dim: int = 16,
        page_tokens: int = 4,
        device: str = "cpu",
        cache_dtype: torch.dtype = torch.float32,
    ) -> None:
        torch.manual_seed(1)
        self.sequences, self.page_tokens, self.device = sequences, page_tokens, device
        num_heads, num_kv_heads = heads
        num_blocks = 8 + sum(-(-each.context_len // page_tokens) for each in sequences)
        geometry = LayerGeometry(num_kv_heads, dim, dim)
        self.cache = PagedKVCache([geometry], num_blocks, page_tokens, cache_dtype, torch.device(device))
        leavings = torch.randn(num_blocks, *self.cache.keys[0].shape[1:], device=device)
        self.cache.keys[0][:-1] = leavings.to(cache_dtype)  # of other owners
        if self._is_fp8:
            self.cache.scales[0].key.uniform_(0.01, 0.05)
            self.cache.scales[0].value.uniform_(0.01, 0.05)
        self.bounds = PageBounds(self.cache, [0])
        blocks = random.Random(1).sample(range(num_blocks), num_blocks)
        self.tables = [[blocks.pop() for _ in range(-(-s.context_len // page_tokens))] for s in sequences]
        self.keys = [torch.randn(s.context_len, num_kv_heads, dim, device=device) for s in sequences]
        self.values = [torch.randn(s.context_len, num_kv_heads, dim, device=device) for s in sequences]
        self.queries = [torch.randn(s.num_rows, num_heads, dim, device=device) for s in sequences]

    @property
    def _is_fp8(self) -> bool:
        return self.cache.dtype.itemsize == 1

    def attend(
        self, make: MakeContext, sparsity: Sparsity, only: Sequence[int] | None = None
    ) -> torch.Tensor:
        """[rows, num_heads, dim] of all sequences in order, or of some in a batch of their own."""
        chosen = list(range(len(self.sequences))) if only is None else list(only)
        for index in chosen:
            self._write_past(index, make)
        pieces: list[tuple[int, Span]] = []  # the first row of each in the output, and its span
        firsts = accumulate((self.sequences[index].num_rows for index in chosen), initial=0)
        for index, first in zip(chosen, firsts, strict=False):
            pieces += self._cut(index, first, sparsity)
        pieces.sort(key=lambda each: (each[1].num_rows > 1, each[1].context_len))
        starts = list(accumulate((span.num_rows for _, span in pieces), initial=0))
        order = [first + row for first, span in pieces for row in range(span.num_rows)]
        spans = [
            Span(start, span.num_rows, span.context_len, span.block_table, span.num_prompt_tokens)
            for start, (_, span) in zip(starts, pieces, strict=False)
        ]
        layout = BatchLayout(
            [span for span in spans if span.num_rows == 1],
            [span for span in spans if span.num_rows > 1],
            self.page_tokens,
        )
        new = [-self.sequences[index].num_rows for index in chosen]
        rows = [
            torch.cat([self.queries[index] for index in chosen]),
            torch.cat([self.keys[index][tail:] for index, tail in zip(chosen, new, strict=True)]),
            torch.cat([self.values[index][tail:] for index, tail in zip(chosen, new, strict=True)]),
        ]
        ordered = [each[order].contiguous() for each in rows]
        made = make(self.cache, layout, sparsity, self.bounds).attend(0, *ordered, SCALE, None)
        output = torch.empty_like(made)
        output[order] = made
        return output

    def _cut(self, index: int, first: int, sparsity: Sparsity) -> list[tuple[int, Span]]:
        """As longshore_server.native.pieces: each sparse row is a decode."""
        of, table = self.sequences[index], self.tables[index]
        start = of.context_len - of.num_rows
        num_dense = min(of.num_rows, max(0, max(of.prompt_len, sparsity.dense_below_tokens) - start))
        pieces = [(first, Span(0, num_dense, start + num_dense, table, of.prompt_len))] if num_dense else []
        for row in range(num_dense, of.num_rows):
            pieces.append((first + row, Span(0, 1, start + row + 1, table, of.prompt_len)))
        return pieces

    def _write_past(self, index: int, make: MakeContext) -> None:
        of = self.sequences[index]
        num_past = of.context_len - of.num_rows
        if num_past:
            span = Span(0, num_past, num_past, self.tables[index], num_past)
            query = self.queries[index][:1].expand(num_past, -1, -1).contiguous()
            past = self.keys[index][:num_past], self.values[index][:num_past]
            layout = BatchLayout([], [span], self.page_tokens)
            local = Sparsity(1, dense_layers=frozenset())
            make(self.cache, layout, local, self.bounds).attend(0, query, *past, SCALE, None)

    def expected(self, sparsity: Sparsity) -> torch.Tensor:
        """Row by row and head by head."""
        outputs = []
        for of, queries, raw_keys, raw_values in zip(
            self.sequences, self.queries, self.keys, self.values, strict=True
        ):
            keys = self._stored(raw_keys, self.cache.scales[0].key)
            values = self._stored(raw_values, self.cache.scales[0].value)
            for row in range(of.num_rows):
                length = of.context_len - of.num_rows + row + 1
                is_sparse = length > max(of.prompt_len, sparsity.dense_below_tokens)
                for head in range(queries.shape[1]):
                    group = queries.shape[1] // keys.shape[1]
                    kv_head = head // group
                    heads = queries[row, kv_head * group : (kv_head + 1) * group]
                    seen = list(range(length))
                    if is_sparse:
                        pages = visible_pages(heads, keys[:length, kv_head], sparsity, self.page_tokens)
                        seen = [token for token in seen if token // self.page_tokens in pages]
                    weights = (keys[seen, kv_head] @ queries[row, head] * SCALE).softmax(0)
                    outputs.append(weights @ values[seen, kv_head])
        return torch.stack(outputs).view(-1, *self.queries[0].shape[1:])

    def _stored(self, rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return from_fp8(to_fp8(rows, scale), scale, rows.dtype) if self._is_fp8 else rows


def visible_pages(
    heads: torch.Tensor,  # [query heads of one KV head, dim]
    keys: torch.Tensor,  # [tokens, dim]
    sparsity: Sparsity,
    page_tokens: int,
) -> set[int]:
    num_pages = -(-len(keys) // page_tokens)
    sink = range(min(num_pages, -(-sparsity.sink_tokens // page_tokens)))
    num_window = -(-(sparsity.window_tokens - 1) // page_tokens) + 1
    window = range(max(0, num_pages - num_window), num_pages)
    between = range(len(sink), max(len(sink), num_pages - num_window))
    if not len(between) or not sparsity.top_pages:
        return {*sink, *window}
    scores = torch.empty(len(heads), len(between))
    for column, page in enumerate(between):
        part = keys[page * page_tokens : (page + 1) * page_tokens]
        low, high = part.min(0).values, part.max(0).values
        scores[:, column] = torch.maximum(heads * low, heads * high).sum(1)
    shares = (scores * SCALE).softmax(1).sum(0)
    best = shares.argsort(descending=True)[: sparsity.top_pages].tolist()
    return {*sink, *window, *(between[column] for column in best)}
