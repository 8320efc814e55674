"""Paged attention in torch against a dense softmax written out, any mix of rows, windows, head groups."""

from __future__ import annotations

import random

import pytest
import torch

from longshore_server.native.attention.invariant import plan_invariant_passes
from longshore_server.native.attention.kv_cache import LayerGeometry, PagedKVCache
from longshore_server.native.attention.layout import BatchLayout, Span
from longshore_server.native.attention.reference import ReferenceContext, plan_passes

HEAD_DIM, BLOCK_SIZE, NUM_BLOCKS = 16, 4, 200
SCALE = 0.3


class Batch:
    """Sequences with known keys and values; the earlier tokens of each are in the cache already."""

    def __init__(self, shape: list[tuple[int, int]], num_heads: int, num_kv_heads: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.cache = PagedKVCache(
            [LayerGeometry(num_kv_heads, HEAD_DIM, HEAD_DIM)],
            NUM_BLOCKS,
            BLOCK_SIZE,
            torch.float32,
            torch.device("cpu"),
        )
        free = list(range(NUM_BLOCKS))
        random.Random(seed).shuffle(free)
        self.cache.keys[0][:-1].normal_()  # leavings of other owners
        self.cache.values[0][:-1].normal_()
        self.keys = [torch.randn(context, num_kv_heads, HEAD_DIM) for _, context in shape]
        self.values = [torch.randn(context, num_kv_heads, HEAD_DIM) for _, context in shape]
        self.queries = [torch.randn(rows, num_heads, HEAD_DIM) for rows, _ in shape]
        self.spans = []
        first_row = 0
        for (rows, context), keys, values in zip(shape, self.keys, self.values, strict=True):
            table = [free.pop() for _ in range(-(-context // BLOCK_SIZE))]
            for position in range(context - rows):
                block, offset = table[position // BLOCK_SIZE], position % BLOCK_SIZE
                self.cache.keys[0][block, offset] = keys[position]
                self.cache.values[0][block, offset] = values[position]
            self.spans.append(Span(first_row, rows, context, table))
            first_row += rows

    def attend(self, plan, window: int | None) -> torch.Tensor:
        layout = BatchLayout(
            [span for span in self.spans if span.num_rows == 1],
            [span for span in self.spans if span.num_rows > 1],
            BLOCK_SIZE,
        )
        new = [slice(span.context_len - span.num_rows, span.context_len) for span in self.spans]
        return ReferenceContext(self.cache, layout, plan).attend(
            0,
            torch.cat(self.queries),
            torch.cat([keys[rows] for keys, rows in zip(self.keys, new, strict=True)]),
            torch.cat([values[rows] for values, rows in zip(self.values, new, strict=True)]),
            SCALE,
            window,
        )

    def expected(self, window: int | None) -> torch.Tensor:
        outputs = []
        for span, query, keys, values in zip(self.spans, self.queries, self.keys, self.values, strict=True):
            for row in range(span.num_rows):
                position = span.context_len - span.num_rows + row
                start = 0 if window is None else max(0, position + 1 - window)
                for head in range(query.shape[1]):
                    kv_head = head * keys.shape[1] // query.shape[1]
                    scores = keys[start : position + 1, kv_head] @ query[row, head] * SCALE
                    outputs.append(scores.softmax(0) @ values[start : position + 1, kv_head])
        return torch.stack(outputs).view(-1, self.queries[0].shape[1], HEAD_DIM)


SHAPES = {
    "decodes": [(1, 1), (1, 4), (1, 5), (1, 130), (1, 140)],
    "fresh": [(9, 9)],
    "chunk": [(5, 20)],
    "mixed": [(1, 3), (1, 33), (7, 7), (6, 150), (30, 31)],
}


@pytest.mark.parametrize("plan", [plan_passes, plan_invariant_passes])
@pytest.mark.parametrize("window", [None, 1, 6, 1000])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("shape", list(SHAPES))
def test_equals_dense_attention(shape, heads, window, plan) -> None:
    batch = Batch(SHAPES[shape], *heads, seed=len(shape))
    assert torch.allclose(batch.attend(plan, window), batch.expected(window), atol=1e-5)


@pytest.mark.parametrize("window", [None, 6, 140])
def test_invariant_rows_are_equal_bits_alone_and_in_company(window) -> None:
    batch = Batch(SHAPES["mixed"], 6, 2, seed=3)
    together = batch.attend(plan_invariant_passes, window)
    row = 0
    for index, (num_rows, context) in enumerate(SHAPES["mixed"]):
        for position in range(context - num_rows, context):
            alone = Batch([(1, position + 1)], 6, 2, seed=0)
            alone.keys, alone.values = (
                [batch.keys[index][: position + 1]],
                [batch.values[index][: position + 1]],
            )
            alone.queries = [batch.queries[index][position - context + num_rows][None]]
            table = alone.spans[0].block_table
            for earlier in range(position):
                alone.cache.keys[0][table[earlier // BLOCK_SIZE], earlier % BLOCK_SIZE] = alone.keys[0][
                    earlier
                ]
                alone.cache.values[0][table[earlier // BLOCK_SIZE], earlier % BLOCK_SIZE] = alone.values[0][
                    earlier
                ]
            assert torch.equal(alone.attend(plan_invariant_passes, window)[0], together[row])
            row += 1


def test_cleared_blocks_do_not_pass_nan_on() -> None:
    batch = Batch([(1, 2)], 4, 2, seed=1)
    block = batch.spans[0].block_table[0]
    batch.cache.keys[0][block] = float("nan")
    batch.cache.values[0][block] = float("nan")
    batch.cache.clear_blocks([block])
    batch.cache.keys[0][block, 0], batch.cache.values[0][block, 0] = batch.keys[0][0], batch.values[0][0]
    assert torch.allclose(batch.attend(plan_passes, None), batch.expected(None), atol=1e-5)
