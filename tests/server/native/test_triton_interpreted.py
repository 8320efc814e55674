"""The GPU's kernels and its runner in Triton's interpreter: `make interpreted`.

Every number is float32. What a GPU alone shows, the order of threads, captured steps, tensor cores and speed,
stands in tests/gpu.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import random
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longshore.seeds import row_keys
from longshore_server.native import EngineConfig, SamplingParams
from longshore_server.native.attention.kv_cache import KVScales, KVTarget, LayerGeometry, PagedKVCache
from longshore_server.native.attention.layout import BatchLayout, Span
from longshore_server.native.attention.reference import ReferenceContext, plan_passes
from longshore_server.native.attention.sparsity import Sparsity, parse_sparsity
from longshore_server.native.model import fused_ops
from longshore_server.native.model.fp8 import ScaledOutput
from longshore_server.native.model.load import load_model
from longshore_server.native.sampler import sample
from longshore_server.native.sequence import Sequence
from sparse_batch import Rows, SparseBatch

pytestmark = [
    pytest.mark.interpreted,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter"),
]

SIZE = 8
HEADS = [(4, 2, 16), (3, 1, 20)]
# (rows, context): decodes first, shortest first
SHAPE = [(1, 1), (1, 17), (1, 150), (5, 5), (20, 45)]
ALWAYS: dict[str, Any] = {"dense_layers": frozenset(), "dense_below_tokens": 0}


# --- attention ---


@pytest.mark.parametrize("form", ["plain", "invariant"])
@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_attention_is_the_references(heads, window, form) -> None:
    from longshore_server.native.attention.triton_context import context_type, make_context

    num_heads, num_kv_heads, dim = heads
    torch.manual_seed(2)
    num_blocks = 4 + sum(-(-context // SIZE) for _, context in SHAPE)
    geometry = LayerGeometry(num_kv_heads, dim, dim)
    cache = PagedKVCache([geometry], num_blocks, SIZE, torch.float32, torch.device("cpu"))
    cache.keys[0].normal_()
    cache.values[0].normal_()
    free = random.Random(2).sample(range(num_blocks), num_blocks)
    spans, first_row = [], 0
    for num_rows, context in SHAPE:
        spans.append(Span(first_row, num_rows, context, [free.pop() for _ in range(-(-context // SIZE))]))
        first_row += num_rows
    layout = BatchLayout(spans[:3], spans[3:], SIZE)
    rows = [torch.randn(first_row, each, dim) for each in (num_heads, num_kv_heads, num_kv_heads)]
    expected = ReferenceContext(cache, layout, plan_passes).attend(0, *rows, 0.3, window)
    context = make_context(cache, layout, context_type(form == "invariant"))
    assert torch.allclose(context.attend(0, *rows, 0.3, window), expected, atol=1e-5)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize(
    "sparsity",
    [
        Sparsity(window_tokens=17, sink_tokens=10, **ALWAYS),
        Sparsity(window_tokens=9, sink_tokens=8, top_pages=4, **ALWAYS),
        Sparsity(window_tokens=1, sink_tokens=0, top_pages=2, **ALWAYS),
        Sparsity(9, 8, 2, dense_layers=frozenset(), dense_below_tokens=99),
    ],
    ids=["window", "top pages", "top pages alone", "long only"],
)
def test_sparse_rows_see_sink_window_and_their_best_pages(sparsity, heads) -> None:
    from longshore_server.native.attention.triton_context import make_context
    from longshore_server.native.attention.triton_pages import page_picker

    def make(cache, layout, sparsity, bounds):
        return make_context(cache, layout, picker=page_picker(sparsity, bounds))

    num_heads, num_kv_heads, dim = heads
    sequences = [Rows(1, 3, 2), Rows(1, 90, 11), Rows(1, 70, 70), Rows(9, 9, 9), Rows(4, 130, 128)]
    batch = SparseBatch(sequences, (num_heads, num_kv_heads), dim=dim, page_tokens=SIZE)
    assert torch.allclose(batch.attend(make, sparsity), batch.expected(sparsity), atol=1e-5)


@given(st.lists(st.integers(0, 40_000), min_size=1, max_size=64), st.sampled_from([1, 2, 8, 32]))
@settings(max_examples=40, deadline=None)  # the interpreter takes its time
def test_parts_have_every_tile_of_every_row_once(lens, num_kv_heads) -> None:
    from longshore_server.native.attention import triton_parts

    tile = triton_parts.TILE_TOKENS
    parts = triton_parts.cut_contexts(torch.tensor(lens), num_kv_heads).tolist()
    used = [part for part in parts if part[0] >= 0]
    assert parts[: len(used)] == used and [part[0] for part in used] == sorted(part[0] for part in used)
    for row, length in enumerate(lens):
        mine = [(number, part) for number, part in enumerate(used) if part[0] == row]
        places = [place for _, (_, low, end, *_) in mine for place in range(low, end)]
        assert places == list(range(-(-max(length - 1, 0) // tile)))
        assert {tuple(part[3:5]) for _, part in mine} == {(mine[0][0], len(mine))}
        sizes = [end - low for _, (_, low, end, *_) in mine]
        assert len(mine) == 1 or min(sizes) > 0, "a part of a context that is cut has something to do"


def test_products_are_attended_by_dense_decodes_over_a_cache_of_their_type(monkeypatch) -> None:
    """Which the kernel does on a GPU alone; here it is asked what it would take."""
    from longshore_server.native.attention import triton_context
    from longshore_server.native.attention.interface import DecodeRows, QkvProduct
    from longshore_server.native.attention.triton_context import InvariantContext, StepTables, TritonContext

    monkeypatch.setattr(triton_context, "has_gluon", lambda device: True)
    monkeypatch.setattr(TritonContext, "max_product_rows", 2)

    def takes(make=TritonContext, num_rows=2, dim=64, group=4, dtype=torch.bfloat16, cached=None, **changes):
        cache = PagedKVCache([LayerGeometry(2, dim, dim)], 3, SIZE, cached or dtype, torch.device("cpu"))
        zeros = torch.zeros(num_rows, dtype=torch.int64)
        rows = DecodeRows(zeros, zeros, zeros)
        arrivals = torch.zeros(2 * num_rows, dtype=torch.int32)
        tables = StepTables(zeros, torch.zeros(1, 3, dtype=torch.int32), num_rows, rows, arrivals=arrivals)
        context = make(cache, dataclasses.replace(tables, **changes.pop("tables", {})), **changes)
        angles = torch.ones(num_rows, dim, dtype=dtype)
        channels = torch.ones(num_rows, (2 * group + 4) * dim, dtype=dtype)
        return context.takes(0, QkvProduct(ScaledOutput(channels), angles, angles, 2 * group, 2, None))

    assert takes() and takes(dim=128, group=16) and takes(dtype=torch.float16)
    assert not takes(InvariantContext) and not takes(picker=object()) and not takes(num_rows=3)
    assert not takes(tables={"spans": object()}) and not takes(tables={"arrivals": None})
    assert not takes(dim=80) and not takes(group=17) and not takes(dtype=torch.float32)
    assert not takes(cached=torch.float8_e4m3fn) and not takes(cached=torch.float16)


# --- layers ---


def _scaled(num_rows: int, num_channels: int) -> ScaledOutput:
    parts = torch.rand(num_rows) + 0.5, torch.rand(num_channels) + 0.5, torch.randn(num_channels)
    return ScaledOutput(torch.randn(num_rows, num_channels), *parts)


def _in_parts(num_rows: int, num_channels: int) -> ScaledOutput:
    whole = _scaled(num_rows, num_channels)
    return dataclasses.replace(whole, values=torch.randn(3, num_rows, num_channels))


@pytest.mark.parametrize("make", [lambda *shape: ScaledOutput(torch.randn(*shape)), _scaled, _in_parts])
def test_rows_are_the_references(make) -> None:
    from longshore_server.native.model import triton_resolve, triton_rope, triton_rows

    torch.manual_seed(3)
    near = partial(torch.allclose, atol=1e-5)
    for num_rows, width in ((1, 24), (7, 1100), (65, 48)):
        x, weight = make(num_rows, width), torch.rand(width)
        residuals = [torch.randn(num_rows, width)]
        for residual in residuals if x.row_scales is not None else [None, *residuals]:
            mine = triton_rows.add_rms_norm(x, residual, weight, 1e-5, False)
            expected = fused_ops.add_rms_norm(x, residual, weight, 1e-5, False)
            assert all(near(a, b) for a, b in zip(mine, expected, strict=True))
        wide = make(num_rows, 2 * width)
        expected = fused_ops.silu_mul(wide, torch.float32, False)
        assert near(triton_rows.silu_mul(wide, torch.float32, False), expected)
        rounded, expected = (each.silu_mul(wide, torch.float32, True) for each in (triton_rows, fused_ops))
        assert near(rounded.scales, expected.scales)
        # rounding up to a power of two, the interpreter forgets the exponent: half, or 0 for the smallest
        mine, theirs = (each.values.float() for each in (rounded, expected))
        assert torch.allclose(mine, theirs, rtol=0.5, atol=2**-9)
        unbiased = dataclasses.replace(x, bias=None)
        assert near(triton_resolve.resolve(unbiased, torch.float32), unbiased.resolve(torch.float32))
    num_rows, heads, kv_heads, dim = 11, 6, 2, 16
    cos, sin = (torch.rand(num_rows, dim // 2).repeat(1, 2) for _ in "cs")
    slots = torch.randperm(3 * SIZE)[:num_rows]
    slots[4] = -1
    ones = KVScales(torch.ones(kv_heads), torch.ones(kv_heads))
    x = make(num_rows, (heads + 2 * kv_heads) * dim)
    for norms in (None, (torch.rand(dim), torch.rand(dim), 1e-5)):
        results, all_pages = [], []
        for split in (triton_rope.split_qkv, fused_ops.split_qkv):
            pages = [torch.zeros(3, SIZE, kv_heads, dim) for _ in "kv"]
            target = KVTarget(*pages, ones, slots)
            results.append(split(x, cos, sin, heads, kv_heads, norms, target=target, keep_rows=True))
            all_pages.append(pages)
        assert all(near(a, b) for a, b in zip(*results, strict=True))
        assert all(near(a, b) for a, b in zip(*all_pages, strict=True))
    frequencies = torch.rand(24)  # no power of two
    angles = torch.randint(0, 2000, (num_rows,)), frequencies, 1.25, torch.float32
    results = [each.rotary_angles(*angles) for each in (triton_rope, fused_ops)]
    assert all(near(a, b) for a, b in zip(*results, strict=True))


def test_the_invariant_product_is_a_product() -> None:
    from longshore_server.native.gemm import triton_invariant

    torch.manual_seed(4)
    rows, weight, bias = torch.randn(5, 72).half(), torch.randn(40, 72).half(), torch.randn(40).half()
    for each in (None, bias):
        expected = torch.nn.functional.linear(
            rows.float(), weight.float(), None if each is None else each.float()
        )
        output = triton_invariant.multiply(rows, weight, each, torch.float16)
        assert torch.allclose(output.float(), expected, atol=2e-2)


def test_one_row_times_a_matrix() -> None:
    from longshore_server.native.gemm import triton_gemv

    torch.manual_seed(4)
    for num_outputs, width in ((512, 24), (4, 4000), (8, 9000)):  # pieces of many rows, of one, of parts
        row, weight, bias = torch.randn(1, width), torch.randn(num_outputs, width), torch.randn(num_outputs)
        for each in (None, bias):
            expected = torch.nn.functional.linear(row, weight, each)
            output = triton_gemv.multiply_row(row, weight, each, torch.float32)
            assert torch.allclose(output, expected, atol=1e-3)


@given(st.integers(1, 3000), st.integers(1, 200), st.integers(1, 200), st.booleans())
def test_few_rows_take_every_tile_once(num_tiles, num_steps, num_multiprocessors, may_split) -> None:
    from longshore_server.native.gemm import gluon_few_rows

    num_outputs = 64 * num_tiles
    of = gluon_few_rows._launch_of(num_outputs, num_steps, num_multiprocessors, may_split)
    assert num_outputs % of.tile_height == 0 and num_steps % of.num_splits == 0
    assert may_split or of.num_splits == 1
    num_groups, rest = divmod(of.num_programs, of.num_splits)
    assert rest == 0
    tiles = num_outputs // of.tile_height
    assert (num_groups - 1) * of.tiles_per_program < tiles <= num_groups * of.tiles_per_program
    # No multiprocessor has two of them, but where there are fewer than parts.
    assert of.num_programs <= max(num_multiprocessors, of.num_splits)


def test_another_tritons_gluon_is_left_alone(monkeypatch, caplog) -> None:
    import triton

    from longshore_server.native.gemm.multiply import few_rows_kernel
    from longshore_server.native.gpu.gluon import knows_gluon

    knows_gluon.cache_clear()
    module = few_rows_kernel()
    assert module is not None and module.__name__.endswith("gluon_few_rows")
    knows_gluon.cache_clear()
    monkeypatch.setattr(triton, "__version__", "3.10.0")
    assert few_rows_kernel() is None and few_rows_kernel() is None
    assert len(caplog.records) == 1 and "3.10.0" in caplog.text
    knows_gluon.cache_clear()


def test_kernels_of_decodes_compile_for_hopper(tmp_path) -> None:
    """Those that cannot be interpreted; what they compute is tested on a GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    script = Path(__file__).with_name("compile_for_hopper.py")
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert {"28672", "float8_e4m3fn", "128"} <= set(done.stdout.split())


# --- tokens ---


def _sequence(seed: int, **params: Any) -> Sequence:
    return Sequence("r", [1, 2], SamplingParams(seed=seed, **params), max_model_len=99)


def test_tokens_are_those_of_the_host() -> None:
    from longshore_server.native.gpu.triton_sampling import (
        filter_numbers,
        sample_filtered_rows,
        sample_rows,
    )

    torch.manual_seed(5)
    forms: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 1.3, "top_p": 0.6},
        {"temperature": 0.9, "min_p": 0.2, "top_k": 50},
    ]
    sequences = [_sequence(seed, **form) for seed in range(3) for form in forms]
    logits = torch.randn(len(sequences) + 1, 1000) * 3
    logits[-1, 7] = float("nan")
    seats = torch.arange(len(logits))
    temperatures = torch.tensor([s.params.temperature for s in sequences] + [0.0], dtype=torch.float64)
    keys = torch.tensor([row_keys(s.params.seed, s.next_offset) for s in sequences] + [(0, 0)])
    last, sampled = torch.zeros(len(logits), dtype=torch.int64), torch.zeros(len(logits), dtype=torch.int64)
    sample_rows(logits, temperatures, keys, seats, last, sampled)
    filtered = [row for row, each in enumerate(sequences) if each.params.is_filtered]
    numbers = filter_numbers(filtered, filtered, [sequences[row] for row in filtered], pinned=False)
    sample_filtered_rows(logits, numbers, last, sampled)
    assert sampled.tolist() == [*(token.token_id for token in sample(logits[:-1], sequences)), -1]
    assert last[:-1].tolist() == sampled[:-1].tolist()


# --- the runner ---


@pytest.fixture
def on_gpu_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines on the CPU run a GPU's runner and its kernels, none of them captured."""
    import longshore_server.native.ranks.start as start
    from longshore_server.native.attention import triton_decode
    from longshore_server.native.gpu.runner import GpuRunner
    from longshore_server.native.model import triton_rope, triton_rows

    build = start.build

    def build_for_gpu(config, links=None):
        built = build(config, links)
        plain = built.runner
        runner = GpuRunner(
            plain.model,
            plain.cache,
            config.max_num_seqs,
            built.max_model_len,
            sparsity=parse_sparsity(config.attention_sparsity),
            bounds=built.page_bounds,
        )
        return dataclasses.replace(built, runner=runner)

    monkeypatch.setattr(start, "build", build_for_gpu)
    monkeypatch.setattr(triton_decode, "NUM_PROGRAMS_WANTED", 12)  # one after the other here
    monkeypatch.setattr(fused_ops, "add_rms_norm", triton_rows.add_rms_norm)
    monkeypatch.setattr(fused_ops, "silu_mul", triton_rows.silu_mul)
    monkeypatch.setattr(fused_ops, "split_qkv", triton_rope.split_qkv)


@pytest.mark.parametrize(
    "sparsity",
    ["dense", "sink=8 window=8 top_pages=2 dense_layers=0 dense_below=16"],
    ids=["dense", "sparse"],
)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_answers_are_those_of_the_cpu(family, sparsity, make_engine, greedy, request) -> None:
    """Preempted, too: there is memory for both prompts, but not for both answers."""
    chosen = random.Random(3)
    prompts = [[chosen.randrange(3, 300) for _ in range(length)] for length in (18, 21)]
    settings: dict[str, Any] = {
        "fuse_layers": True,
        "attention_sparsity": sparsity,
        "enable_prefix_cache": False,
        "max_model_len": 48,
        "max_num_batched_tokens": 32,
        "max_num_seqs": 4,
    }
    params = greedy(8, ignore_eos=True)
    expected = make_engine(family, **settings).generate(prompts, params)
    request.getfixturevalue("on_gpu_path")
    engine = make_engine(family, **settings, num_kv_blocks=12)
    assert engine.generate(prompts, params) == expected
    assert engine.stats().preemptions > 0
    engine.check_integrity()


@pytest.mark.parametrize("num_tokens", [1, 20])
@pytest.mark.parametrize("settings", [{}, {"attention_sparsity": "sink=8 window=8 top_pages=2"}], ids=str)
@pytest.mark.usefixtures("on_gpu_path")
def test_the_first_layer_alone_rehearses_a_step(settings, num_tokens, model_folder, monkeypatch) -> None:
    from longshore_server.native import startup
    from longshore_server.native.gpu import rehearsal
    from longshore_server.native.gpu.runner import GpuRunner

    launched = []
    launch = GpuRunner.launch
    monkeypatch.setattr(
        GpuRunner, "launch", lambda self, chunks: launched.append(chunks) or launch(self, chunks)
    )
    monkeypatch.setattr(rehearsal, "STEP_TOKENS", (num_tokens,))  # the interpreter has one thread
    config = EngineConfig(model=str(model_folder("llama")), fuse_layers=True, max_model_len=48, **settings)
    rehearsed = []

    def begin(model) -> None:
        rehearsed.append(weakref.ref(model))
        begun.begin(model)

    gc.disable()
    try:
        with startup._rehearsal(config, torch.device("cpu")) as begun:
            load_model(config, on_first_layer=begin)
            assert begun.has_begun
            begun.finish()
        assert [each() for each in rehearsed] == [None]  # the KV cache gets its memory
    finally:
        gc.enable()
    assert [chunk.num_tokens for chunks in launched for chunk in chunks] == [num_tokens]
