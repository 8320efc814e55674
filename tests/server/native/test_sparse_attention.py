"""Sparse attention against softmax written out over the tokens it may see, and against dense attention."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longshore_server.native.attention.fp8_reference import Fp8Context
from longshore_server.native.attention.reference import ReferenceContext, plan_passes
from longshore_server.native.attention.sparse import SparseContext
from longshore_server.native.attention.sparsity import Sparsity, parse_sparsity
from longshore_server.native.config import EngineConfig
from longshore_server.native.errors import ConfigError
from longshore_server.native.pieces import cut_sparse_rows
from longshore_server.native.sampling_params import SamplingParams
from longshore_server.native.scheduler import Chunk
from longshore_server.native.sequence import Sequence
from sparse_batch import Rows, SparseBatch

SPARSITIES = {
    "window": Sparsity(window_tokens=9, sink_tokens=3, dense_layers=frozenset(), dense_below_tokens=0),
    "top": Sparsity(
        window_tokens=5, sink_tokens=4, top_pages=3, dense_layers=frozenset(), dense_below_tokens=0
    ),
    "long-only": Sparsity(
        window_tokens=5, sink_tokens=4, top_pages=2, dense_layers=frozenset(), dense_below_tokens=40
    ),
}
# Decodes, one of them a prompt's last token, and prefills, of which two hold generated tokens that are
# computed again.
SEQUENCES = [
    Rows(1, 3, 2),
    Rows(1, 37, 20),
    Rows(1, 90, 90),
    Rows(1, 130, 11),
    Rows(9, 9, 9),
    Rows(12, 80, 74),
    Rows(6, 41, 0),
]
ALL = Sparsity(window_tokens=1000, dense_layers=frozenset(), dense_below_tokens=0)


def sparse(cache, layout, sparsity, bounds):
    dense = Fp8Context if cache.dtype.itemsize == 1 else ReferenceContext
    make_dense = partial(dense, plan=plan_passes)
    return SparseContext(cache, layout, make_dense=make_dense, sparsity=sparsity, bounds=bounds)


def dense(cache, layout, sparsity, bounds):
    return ReferenceContext(cache, layout, plan_passes)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("name", list(SPARSITIES))
def test_each_row_sees_sink_window_and_its_best_pages(name, heads) -> None:
    batch = SparseBatch(SEQUENCES, heads)
    sparsity = SPARSITIES[name]
    output = batch.attend(sparse, sparsity)
    assert torch.allclose(output, batch.expected(sparsity), atol=1e-5)
    assert not torch.allclose(output, batch.attend(dense, sparsity), atol=1e-2)


@pytest.mark.parametrize("name", list(SPARSITIES))
def test_an_fp8_cache_is_seen_as_it_is_rounded(name) -> None:
    sequences = [rows for rows in SEQUENCES if rows.num_rows < rows.context_len]  # the others read no pages
    batch = SparseBatch(sequences, (6, 2), cache_dtype=torch.float8_e4m3fn)
    output = batch.attend(sparse, SPARSITIES[name])
    assert torch.allclose(output, batch.expected(SPARSITIES[name]), atol=1e-5)


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
    batch = SparseBatch(SEQUENCES, (6, 2))
    assert torch.allclose(batch.attend(sparse, sparsity), batch.attend(dense, sparsity), atol=1e-6)


@pytest.mark.parametrize("name", list(SPARSITIES))
def test_a_row_sees_the_same_alone_and_in_company(name) -> None:
    batch = SparseBatch(SEQUENCES, (6, 2))
    together = batch.attend(sparse, SPARSITIES[name])
    first_row = 0
    for index, rows in enumerate(SEQUENCES):
        alone = batch.attend(sparse, SPARSITIES[name], only=[index])
        assert torch.allclose(alone, together[first_row : first_row + rows.num_rows], atol=1e-6)
        first_row += rows.num_rows


def test_the_page_with_the_wanted_key_is_among_the_picked() -> None:
    batch = SparseBatch([Rows(1, 203, 100)], (6, 2))
    token = 121
    batch.keys[0][token, 1] = batch.queries[0][0, 4] * 3
    sparsity = Sparsity(
        window_tokens=4, sink_tokens=4, top_pages=1, dense_layers=frozenset(), dense_below_tokens=0
    )
    assert torch.allclose(batch.attend(sparse, sparsity)[0, 4], batch.values[0][token, 1], atol=0.1)
    blind = Sparsity(window_tokens=4, sink_tokens=4, dense_layers=frozenset(), dense_below_tokens=0)
    assert not torch.allclose(batch.attend(sparse, blind)[0, 4], batch.values[0][token, 1], atol=0.1)


def test_another_owners_nan_in_the_padding_of_a_page_is_not_ranked() -> None:
    batch = SparseBatch([Rows(1, 203, 100)], (6, 2))
    clean = batch.attend(sparse, SPARSITIES["top"])
    assert not clean.isnan().any()
    batch.cache.keys[0][batch.tables[0][-1], 3] = 1e30  # behind the context's end
    assert torch.equal(batch.attend(sparse, SPARSITIES["top"]), clean)


# --- pieces of chunks ---


@given(
    prompt=st.integers(1, 30),
    generated=st.integers(1, 30),
    computed=st.integers(0, 60),
    num_tokens=st.integers(1, 60),
    dense_below=st.integers(0, 70),
)
def test_pieces_are_the_chunk_and_each_sparse_row_is_alone(
    prompt, generated, computed, num_tokens, dense_below
) -> None:
    answer = range(3, 3 + generated)
    sequence = Sequence("r", [3] * prompt, SamplingParams(), max_model_len=200, continue_from=answer)
    total = prompt + generated
    sequence.num_computed_tokens = min(computed, total - 1)
    num_tokens = min(num_tokens, total - sequence.num_computed_tokens)
    chunk = Chunk(sequence, num_tokens, sequence.num_computed_tokens + num_tokens == total)
    other = Chunk(sequence, 1, samples=False)
    sparsity = Sparsity(window_tokens=4, dense_below_tokens=dense_below)

    assert cut_sparse_rows([chunk], None) == [(0, chunk)]
    pieces = cut_sparse_rows([other, chunk], sparsity)
    assert pieces[0] == (0, other)
    places = [place for index, piece in pieces[1:] for place in range(piece.start, piece.context_len)]
    assert places == list(range(chunk.start, chunk.context_len))
    assert [piece.samples for _, piece in pieces[1:]] == [False] * (len(pieces) - 2) + [chunk.samples]
    for index, piece in pieces[1:]:
        assert index == 1
        is_sparse = piece.context_len > max(prompt, dense_below)
        assert piece.num_tokens == 1 or not is_sparse


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


def test_an_fp8_cache_gives_the_dense_engines_answers_when_all_is_seen(make_engine, greedy) -> None:
    prompts, params = _long_prompts(6), greedy(24, ignore_eos=True)
    make = partial(make_engine, "llama", kv_cache_dtype="fp8")
    dense = make().generate(prompts, params)
    wide = make(attention_sparsity="window=256 dense_layers=none dense_below=0")
    assert wide.generate(prompts, params) == dense
    top = make(attention_sparsity="sink=4 window=8 top_pages=60 dense_layers=none dense_below=0")
    assert top.generate(prompts, params) == dense
    narrow = make(attention_sparsity="sink=4 window=8 top_pages=2 dense_layers=none dense_below=0")
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


def test_an_answer_that_is_read_as_a_prompt_is_read_densely(make_engine, greedy) -> None:
    """The cache has the answer's own, sparse KV; a prompt with the same tokens must not be given that."""
    setting = "sink=4 window=8 top_pages=1 dense_layers=none dense_below=16"
    prompt, params = _long_prompts(1)[0][:70], greedy(24, ignore_eos=True)
    engine = make_engine(attention_sparsity=setting)
    (answer,) = engine.generate([prompt], params)
    chat = [*prompt, *answer, *_long_prompts(2)[1][:30]]
    before = engine.stats().prefix_cache_hits
    (later,) = engine.generate([chat], params)
    num_found = engine.stats().prefix_cache_hits - before
    assert 60 <= num_found <= 72  # the prompt's own blocks, and none of the answer's
    fresh = make_engine(attention_sparsity=setting, enable_prefix_cache=False)
    assert [later] == fresh.generate([chat], params)


def test_an_answer_that_goes_on_finds_its_own_blocks(make_engine, greedy) -> None:
    setting = "sink=4 window=8 top_pages=1 dense_layers=none dense_below=16"
    prompt, params = _long_prompts(1)[0][:70], greedy(24, ignore_eos=True)
    engine = make_engine(attention_sparsity=setting)
    (answer,) = engine.generate([prompt], params)
    before = engine.stats().prefix_cache_hits
    engine.add_request("again", prompt, params, continue_from=answer[:20])
    tokens = list(answer[:20])
    while engine.has_unfinished():
        tokens += [output.token_id for output in engine.step()]
    assert tokens == answer
    assert engine.stats().prefix_cache_hits - before >= 84


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
