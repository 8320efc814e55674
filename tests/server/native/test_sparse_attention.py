"""Sparse attention against softmax written out over the tokens it may see, and against dense attention."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch

from longshore_server.native.attention.kv_cache import LayerGeometry, PagedKVCache
from longshore_server.native.attention.layout import BatchLayout, Span
from longshore_server.native.attention.page_bounds import PageBounds
from longshore_server.native.attention.reference import ReferenceContext, plan_passes
from longshore_server.native.attention.sparse import SparseContext
from longshore_server.native.attention.sparsity import Sparsity, parse_sparsity
from longshore_server.native.config import EngineConfig
from longshore_server.native.errors import ConfigError

DIM, SIZE, NUM_BLOCKS, SCALE = 16, 4, 400, 0.3
SPARSITIES = {
    "window": Sparsity(window_tokens=9, sink_tokens=3, dense_layers=frozenset(), dense_below_tokens=0),
    "top": Sparsity(
        window_tokens=5, sink_tokens=4, top_pages=3, dense_layers=frozenset(), dense_below_tokens=0
    ),
    "long-only": Sparsity(
        window_tokens=5, sink_tokens=4, top_pages=2, dense_layers=frozenset(), dense_below_tokens=40
    ),
}
# (rows, context, prompt): decodes by context first, one of them a prompt's last token; then prefills, of
# which one holds generated tokens that are computed again
SHAPE = [(1, 3, 2), (1, 37, 20), (1, 90, 90), (1, 130, 11), (9, 9, 9), (12, 80, 74), (6, 41, 0)]
ALL = Sparsity(window_tokens=1000, dense_layers=frozenset(), dense_below_tokens=0)


class Batch:
    """Sequences with known keys and values; the earlier tokens of each were written by earlier steps."""

    def __init__(self, shape: list[tuple[int, int, int]], num_heads: int, num_kv_heads: int) -> None:
        torch.manual_seed(1)
        geometry = LayerGeometry(num_kv_heads, DIM, DIM)
        self.cache = PagedKVCache([geometry], NUM_BLOCKS, SIZE, torch.float32, torch.device("cpu"))
        self.cache.keys[0][:-1].normal_()  # leavings of other owners
        self.bounds = PageBounds(self.cache, [0])
        blocks = random.Random(1).sample(range(NUM_BLOCKS), NUM_BLOCKS)
        self.keys = [torch.randn(context, num_kv_heads, DIM) for _, context, _ in shape]
        self.values = [torch.randn(context, num_kv_heads, DIM) for _, context, _ in shape]
        self.queries = [torch.randn(rows, num_heads, DIM) for rows, _, _ in shape]
        self.tables = [[blocks.pop() for _ in range(-(-context // SIZE))] for _, context, _ in shape]
        self.shape = shape

    def attend(self, sparsity: Sparsity | None, only: list[int] | None = None) -> torch.Tensor:
        """The output for all rows, or for those of some sequences in a batch of their own."""
        chosen = list(range(len(self.shape))) if only is None else only
        for index in chosen:  # the past, written as a prefill would have
            rows, context, prompt = self.shape[index]
            if context > rows:
                past = [Span(0, context - rows, context - rows, self.tables[index], prompt)]
                new = slice(0, context - rows)
                self._context(BatchLayout([], past, SIZE), ALL).attend(
                    0, self.queries[index][:1].expand(context - rows, -1, -1), self.keys[index][new],
                    self.values[index][new], SCALE, None,
                )  # fmt: skip
        spans, first_row = [], 0
        for index in chosen:
            rows, context, prompt = self.shape[index]
            spans.append(Span(first_row, rows, context, self.tables[index], prompt))
            first_row += rows
        layout = BatchLayout(
            [s for s in spans if s.num_rows == 1], [s for s in spans if s.num_rows > 1], SIZE
        )
        tail = [slice(self.shape[i][1] - self.shape[i][0], self.shape[i][1]) for i in chosen]
        return self._context(layout, sparsity).attend(
            0,
            torch.cat([self.queries[i] for i in chosen]),
            torch.cat([self.keys[i][new] for i, new in zip(chosen, tail, strict=True)]),
            torch.cat([self.values[i][new] for i, new in zip(chosen, tail, strict=True)]),
            SCALE,
            None,
        )

    def _context(self, layout: BatchLayout, sparsity: Sparsity | None):
        if sparsity is None:
            return ReferenceContext(self.cache, layout, plan_passes)
        return SparseContext(self.cache, layout, plan=plan_passes, sparsity=sparsity, bounds=self.bounds)

    def expected(self, sparsity: Sparsity) -> torch.Tensor:
        """Row by row and head by head, from the definition."""
        outputs = []
        for (rows, context, prompt), queries, keys, values in zip(
            self.shape, self.queries, self.keys, self.values, strict=True
        ):
            for row in range(rows):
                length = context - rows + row + 1
                is_sparse = length > max(prompt, sparsity.dense_below_tokens)
                for head in range(queries.shape[1]):
                    group = queries.shape[1] // keys.shape[1]
                    kv_head = head // group
                    heads = queries[row, kv_head * group : (kv_head + 1) * group]
                    seen = list(range(length))
                    if is_sparse:
                        pages = _visible_pages(heads, keys[:length, kv_head], sparsity)
                        seen = [token for token in seen if token // SIZE in pages]
                    weights = (keys[seen, kv_head] @ queries[row, head] * SCALE).softmax(0)
                    outputs.append(weights @ values[seen, kv_head])
        return torch.stack(outputs).view(-1, self.queries[0].shape[1], DIM)


def _visible_pages(heads: torch.Tensor, keys: torch.Tensor, sparsity: Sparsity) -> set[int]:
    num_pages = -(-len(keys) // SIZE)
    sink = range(min(num_pages, -(-sparsity.sink_tokens // SIZE)))
    num_window = -(-(sparsity.window_tokens - 1) // SIZE) + 1
    window = range(max(0, num_pages - num_window), num_pages)
    between = range(len(sink), max(len(sink), num_pages - num_window))
    scores = torch.empty(len(heads), len(between))
    for column, page in enumerate(between):
        part = keys[page * SIZE : (page + 1) * SIZE]
        low, high = part.min(0).values, part.max(0).values
        scores[:, column] = torch.maximum(heads * low, heads * high).sum(1)
    if not len(between):
        return {*sink, *window}
    shares = (scores * SCALE).softmax(1).sum(0)
    best = shares.argsort(descending=True)[: sparsity.top_pages].tolist()
    return {*sink, *window, *(between[column] for column in best)}


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("name", list(SPARSITIES))
def test_each_row_sees_sink_window_and_its_best_pages(name, heads) -> None:
    batch = Batch(SHAPE, *heads)
    sparsity = SPARSITIES[name]
    output = batch.attend(sparsity)
    assert torch.allclose(output, batch.expected(sparsity), atol=1e-5)
    assert not torch.allclose(output, batch.attend(None), atol=1e-2)


@pytest.mark.parametrize(
    "sparsity",
    [
        ALL,
        Sparsity(
            window_tokens=1, sink_tokens=0, top_pages=40, dense_layers=frozenset(), dense_below_tokens=0
        ),
        Sparsity(window_tokens=1, sink_tokens=0, dense_layers=frozenset({0}), dense_below_tokens=0),
        Sparsity(window_tokens=1, sink_tokens=0, dense_layers=frozenset(), dense_below_tokens=130),
    ],
    ids=["window", "top pages", "dense layer", "dense length"],
)
def test_equals_dense_attention_when_everything_is_seen(sparsity) -> None:
    batch = Batch(SHAPE, 6, 2)
    assert torch.allclose(batch.attend(sparsity), batch.attend(None), atol=1e-6)


@pytest.mark.parametrize("name", list(SPARSITIES))
def test_a_row_sees_the_same_alone_and_in_company(name) -> None:
    batch = Batch(SHAPE, 6, 2)
    together = batch.attend(SPARSITIES[name])
    first_row = 0
    for index, (rows, _, _) in enumerate(SHAPE):
        alone = batch.attend(SPARSITIES[name], only=[index])
        assert torch.allclose(alone, together[first_row : first_row + rows], atol=1e-6)
        first_row += rows


def test_the_page_with_the_wanted_key_is_among_the_picked() -> None:
    batch = Batch([(1, 203, 100)], 6, 2)
    token = 121
    batch.keys[0][token, 1] = batch.queries[0][0, 4] * 3
    sparsity = Sparsity(
        window_tokens=4, sink_tokens=4, top_pages=1, dense_layers=frozenset(), dense_below_tokens=0
    )
    assert torch.allclose(batch.attend(sparsity)[0, 4], batch.values[0][token, 1], atol=0.1)
    blind = Sparsity(window_tokens=4, sink_tokens=4, dense_layers=frozenset(), dense_below_tokens=0)
    assert not torch.allclose(batch.attend(blind)[0, 4], batch.values[0][token, 1], atol=0.1)


def test_another_owners_nan_in_the_padding_of_a_page_is_not_ranked() -> None:
    batch = Batch([(1, 203, 100)], 6, 2)
    clean = batch.attend(SPARSITIES["top"])
    assert not clean.isnan().any()
    batch.cache.keys[0][batch.tables[0][-1], 3] = 1e30  # behind the context's end
    assert torch.equal(batch.attend(SPARSITIES["top"]), clean)


# --- in the engine ---


def _long_prompts(count: int) -> list[list[int]]:
    chosen = random.Random(3)
    return [[chosen.randrange(3, 300) for _ in range(chosen.randrange(60, 150))] for _ in range(count)]


def test_answers_equal_the_dense_engines_when_all_is_seen(make_engine, greedy) -> None:
    prompts, params = _long_prompts(6), greedy(24, ignore_eos=True)
    dense = make_engine("llama").generate(prompts, params)
    wide = make_engine("llama", attention_sparsity="window=256 dense_layers=none dense_below=0")
    assert wide.generate(prompts, params) == dense
    narrow = make_engine("llama", attention_sparsity="sink=4 window=8 dense_layers=none dense_below=0")
    assert narrow.generate(prompts, params) != dense


@pytest.mark.parametrize("family", ["llama", "qwen3-mixed"])
def test_sparse_answers_do_not_depend_on_company_or_preemption(family, make_engine, greedy) -> None:
    """Generated tokens that are computed again after a preemption are sparse again, so the answer stays."""
    make = partial(
        make_engine, family, attention_sparsity="sink=4 window=8 top_pages=3 dense_layers=0 dense_below=32"
    )
    prompts, params = _long_prompts(6), greedy(24, ignore_eos=True)
    alone = make(max_num_seqs=1, enable_prefix_cache=False).generate(prompts, params)
    assert make(max_num_batched_tokens=13).generate(prompts, params) == alone
    starved = make(num_kv_blocks=70, max_model_len=200, enable_prefix_cache=False)
    assert starved.generate(prompts, params) == alone
    assert starved.stats().preemptions > 0
    starved.check_integrity()


@pytest.mark.parametrize(
    "text",
    [
        "", "sparse", "window", "window=0", "window=-1", "window=1e3", "window=8 window=9", "sink=4",
        "window=8 top_pages=99999", "window=8 dense_layers=a", "window=8 dense_layers=0,", "window=8 x=1",
        "dense window=8", "window=" + "9" * 5000,
    ],
)  # fmt: skip
def test_a_wrong_setting_is_named_in_one_line(text) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(model="m", attention_sparsity=text)
    assert caught.value.field == "attention_sparsity"
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 250


def test_the_setting_is_read() -> None:
    assert parse_sparsity("dense") is None
    assert parse_sparsity("window=8 sink=2 top_pages=3 dense_layers=0,5 dense_below=7") == Sparsity(
        8, 2, 3, frozenset({0, 5}), 7
    )
    assert parse_sparsity("window=8 dense_layers=none") == Sparsity(8, dense_layers=frozenset())


def test_it_excludes_the_invariant_mode() -> None:
    with pytest.raises(ConfigError, match="batch_invariant"):
        EngineConfig(model="m", attention_sparsity="window=8", batch_invariant=True)
    assert not EngineConfig(model="m", attention_sparsity="window=8").may_be_batch_invariant


def test_the_bounds_of_pages_count_as_memory_for_kv(make_engine) -> None:
    kv_memory_bytes = 1 << 20
    engine = make_engine(
        num_kv_blocks=None, kv_memory_bytes=kv_memory_bytes, attention_sparsity="window=8 top_pages=2"
    )
    bounds = engine._runner._make_context.keywords["bounds"]
    tensors = [*engine._runner.cache.stores, *bounds.lowest.values(), *bounds.highest.values()]
    num_blocks = engine._scheduler.pool.num_blocks
    one_block = sum(tensor.nbytes for tensor in tensors) / (num_blocks + 1)  # one more pads tables
    assert bounds.lowest and one_block * num_blocks <= kv_memory_bytes < one_block * (num_blocks + 1)
