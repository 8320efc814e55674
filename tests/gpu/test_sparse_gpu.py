"""Sparse attention's kernels on a GPU against its definition, and sparse answers of the engine."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from longshore_server.native import EngineConfig, NativeEngine, SamplingParams
from longshore_server.native.attention.interface import DecodeRows, PickedPages
from longshore_server.native.attention.sparse import SparseRows, best_pages, slot_tables
from longshore_server.native.attention.sparsity import Sparsity
from sparse_batch import SCALE, Rows, SparseBatch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = "cuda"
PAGE_TOKENS = 16
HEADS = [(32, 8, 128), (64, 8, 128), (16, 16, 128), (8, 1, 80)]
ALWAYS: dict[str, Any] = {"dense_layers": frozenset(), "dense_below_tokens": 0}
SPARSITIES = {
    "window": Sparsity(window_tokens=40, sink_tokens=20, **ALWAYS),
    "top": Sparsity(window_tokens=17, sink_tokens=16, top_pages=5, **ALWAYS),
    "top alone": Sparsity(window_tokens=1, sink_tokens=0, top_pages=3, **ALWAYS),
    "long only": Sparsity(32, 16, 4, dense_layers=frozenset(), dense_below_tokens=300),
}
# Decodes, one of them a prompt's last token; prefills, of which two hold generated tokens computed again.
SEQUENCES = [
    Rows(1, 3, 2),
    Rows(1, 160, 20),
    Rows(1, 500, 500),
    Rows(1, 1111, 11),
    Rows(9, 9, 9),
    Rows(12, 330, 324),
    Rows(6, 305, 0),
]


def triton_context(cache, layout, sparsity, bounds):
    from longshore_server.native.attention.triton_context import make_context
    from longshore_server.native.attention.triton_pages import page_picker

    return make_context(cache, layout, picker=page_picker(sparsity, bounds))


@pytest.mark.parametrize("is_fp8", [False, True], ids=["float32", "fp8"])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", list(SPARSITIES))
def test_each_row_sees_sink_window_and_its_best_pages(name, heads, is_fp8) -> None:
    """In float32, where two pages are never so near to one another that rounding swaps them.

    A stored FP8 number may be off by one where a division is rounded the other way.
    """
    num_heads, num_kv_heads, dim = heads
    batch = SparseBatch(
        SEQUENCES,
        (num_heads, num_kv_heads),
        dim=dim,
        page_tokens=PAGE_TOKENS,
        device=DEVICE,
        cache_dtype=torch.float8_e4m3fn if is_fp8 else torch.float32,
    )
    output = batch.attend(triton_context, SPARSITIES[name])
    expected = batch.expected(SPARSITIES[name])
    errors = (output - expected).norm(dim=(1, 2)) / expected.norm(dim=(1, 2))
    assert errors.max() < (0.05 if is_fp8 else 1e-3), errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("num_top", [1, 6, 64])
def test_the_choice_is_that_of_the_scores(num_top, heads, dtype) -> None:
    """Scores are the bounds' in `dtype`, and of the same scores the pages of the reference are chosen."""
    from longshore_server.native.attention import triton_pages

    num_heads, num_kv_heads, dim = heads
    lens = [1, 90, 500, 777, 2000]
    sparsity = Sparsity(window_tokens=33, sink_tokens=16, top_pages=num_top, **ALWAYS)
    batch = SparseBatch(
        [Rows(length, length, length) for length in lens],
        (num_heads, num_kv_heads),
        dim=dim,
        page_tokens=PAGE_TOKENS,
        device=DEVICE,
        cache_dtype=dtype,
    )
    cache, bounds = batch.cache, batch.bounds
    cache.keys[0].normal_()
    bounds.update(0, torch.arange(cache.num_blocks, device=DEVICE))
    width = max(map(len, batch.tables))
    tables = torch.tensor([table + [0] * (width - len(table)) for table in batch.tables], device=DEVICE)
    context_lens = torch.tensor(lens, device=DEVICE)
    rows = torch.arange(len(lens), device=DEVICE)
    query = torch.randn(len(lens), num_heads, dim, device=DEVICE).to(dtype)

    decodes = DecodeRows(rows, context_lens, torch.zeros_like(rows))
    num_sink, num_window = sparsity.num_sink_pages(PAGE_TOKENS), sparsity.num_window_pages(PAGE_TOKENS)
    pages = bounds.lowest[0], bounds.highest[0], tables.int()
    scores = triton_pages.score_pages(
        query, *pages, decodes, sparsity, PAGE_TOKENS, SCALE, cache.scales[0].key
    )
    wanted = torch.full((len(lens), num_heads, width), float("-inf"), device=DEVICE)
    for row, length in enumerate(lens):
        num_candidates = -(-length // PAGE_TOKENS) - num_sink - num_window
        if num_candidates > 0:
            of_row = wanted[row, :, num_sink : num_sink + num_candidates]
            of_row.copy_(scores[row, :, :num_candidates])
            exact = bounds.scores(0, query[row : row + 1].float(), tables[row : row + 1]).flatten(1, 2)[0]
            exact = exact[:, num_sink : num_sink + num_candidates] * SCALE
            assert torch.allclose(of_row, exact, atol=2e-3 if dtype == torch.float32 else 0.1)

    picked = PickedPages(
        torch.full((len(lens), num_kv_heads, sparsity.num_pages(PAGE_TOKENS)), -1, device=DEVICE).int(),
        torch.full((len(lens),), -1, device=DEVICE),
    )
    triton_pages.choose_pages(scores, tables.int(), decodes, sparsity, PAGE_TOKENS, picked)
    sparse = SparseRows(rows, context_lens, tables)
    grouped = wanted.view(len(lens), num_kv_heads, -1, width)
    shares = grouped.log_softmax(-1).logsumexp(2)
    picks = best_pages(shares, sparse, sparsity, PAGE_TOKENS)
    _, pick_lens = slot_tables(picks, sparse, PAGE_TOKENS, num_kv_heads)
    assert picked.lens.tolist() == pick_lens.tolist()
    for row, length in enumerate(picked.lens.tolist()):
        num_pages = -(-length // PAGE_TOKENS)
        blocks = tables[row][picks[row]][:, :num_pages]
        assert picked.tables[row, :, :num_pages].tolist() == blocks.tolist()


# --- in the engine ---

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 1000,
    "max_position_embeddings": 2048,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "initializer_range": 0.2,
    "torch_dtype": "float32",
}
SPARSE = "sink=16 window=32 top_pages=4 dense_layers=0 dense_below=64"
GREEDY = SamplingParams(max_tokens=32, temperature=0.0, ignore_eos=True)


def _engine(folder: Path, **settings: Any) -> NativeEngine:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    defaults = {
        "device": DEVICE,
        "dtype": "float32",
        "load_format": "random",
        "max_num_seqs": 8,
        "num_kv_blocks": 500,
        "max_model_len": 1024,
    }
    return NativeEngine(EngineConfig(model=str(folder), **{**defaults, **settings}))


def _prompts(*lengths: int) -> list[list[int]]:
    chosen = random.Random(5)
    return [[chosen.randrange(3, CONFIG["vocab_size"]) for _ in range(length)] for length in lengths]


def _agreement(answers: list[list[int]], others: list[list[int]]) -> float:
    """The share of tokens before two answers part."""
    num_same = 0
    for one, other in zip(answers, others, strict=True):
        parted = [a != b for a, b in zip(one, other, strict=True)]
        num_same += parted.index(True) if any(parted) else len(one)
    return num_same / sum(map(len, answers))


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_answers_are_the_dense_ones_when_all_is_seen(tmp_path, kv_cache_dtype) -> None:
    prompts = _prompts(20, 90, 300, 411, 700)
    dense = _engine(tmp_path, kv_cache_dtype=kv_cache_dtype).generate(prompts, GREEDY)
    for words in ("window=2000", "window=16 top_pages=60"):
        setting = f"{words} dense_layers=none dense_below=0"
        wide = _engine(tmp_path, kv_cache_dtype=kv_cache_dtype, attention_sparsity=setting)
        assert _agreement(wide.generate(prompts, GREEDY), dense) > 0.9
    narrow = _engine(tmp_path, kv_cache_dtype=kv_cache_dtype, attention_sparsity=SPARSE)
    assert _agreement(narrow.generate(prompts, GREEDY), dense) < 0.9


def test_captured_steps_see_what_launched_ones_see(tmp_path) -> None:
    prompts = _prompts(20, 90, 300, 411, 700, 65, 128)
    engine = _engine(tmp_path, attention_sparsity=SPARSE, enable_prefix_cache=False)
    engine.generate(prompts, GREEDY)
    engine._runner.settle()  # type: ignore[attr-defined]
    engine.generate(prompts, GREEDY)
    engine._runner.settle()  # type: ignore[attr-defined]
    captured = engine.generate(prompts, GREEDY)
    assert engine._runner._graphs.captured_shapes  # type: ignore[attr-defined]
    eager = _engine(tmp_path, attention_sparsity=SPARSE, enable_prefix_cache=False)
    eager._runner.stay_eager()  # type: ignore[attr-defined]
    assert _agreement(eager.generate(prompts, GREEDY), captured) > 0.95


def test_generated_tokens_that_are_computed_again_are_sparse_again(tmp_path) -> None:
    """Preempted and continued answers stay what they were."""
    prompts = _prompts(90, 300, 411, 200, 250, 128)
    setting: dict[str, Any] = {"attention_sparsity": SPARSE, "enable_prefix_cache": False}
    whole = _engine(tmp_path, **setting).generate(prompts, GREEDY)
    starved = _engine(tmp_path, **setting, num_kv_blocks=66)
    assert _agreement(starved.generate(prompts, GREEDY), whole) > 0.9
    assert starved.stats().preemptions > 0
    starved.check_integrity()
    engine = _engine(tmp_path, **setting)
    tokens: list[list[int]] = [answer[:20] for answer in whole]
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), prompt, GREEDY, continue_from=whole[index][:20])
    while engine.has_unfinished():
        for output in engine.step():
            if output.token_id is not None:
                tokens[int(output.request_id)].append(output.token_id)
    assert _agreement(tokens, whole) > 0.9


def test_pages_that_come_back_are_ranked_as_before(tmp_path) -> None:
    prompts = _prompts(90, 300, 411, 200, 250, 128)
    setting: dict[str, Any] = {"attention_sparsity": SPARSE, "enable_prefix_cache": False}
    whole = _engine(tmp_path, **setting).generate(prompts, GREEDY)
    swapping = _engine(tmp_path, **setting, num_kv_blocks=66, kv_swap=("host:64MiB",))
    assert _agreement(swapping.generate(prompts, GREEDY), whole) > 0.9
    assert swapping.stats().preemptions > 0


def test_the_cpu_gives_the_same_answers(tmp_path) -> None:
    """Its weights are drawn otherwise, so they are written once and loaded by both."""
    from transformers import AutoConfig, AutoModelForCausalLM

    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path), dtype=torch.float32)
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    prompts = _prompts(90, 300, 411)
    answers = [
        _engine(tmp_path, device=device, load_format="auto", attention_sparsity=SPARSE).generate(
            prompts, GREEDY
        )
        for device in (DEVICE, "cpu")
    ]
    assert _agreement(*answers) > 0.9
