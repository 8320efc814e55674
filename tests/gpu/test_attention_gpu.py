"""Paged attention's kernels on a GPU against dense attention in float32, at production head sizes."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from longshore_server.native.attention.interface import DecodeRows
from longshore_server.native.attention.kv_cache import LayerGeometry, PagedKVCache
from longshore_server.native.attention.layout import BatchLayout, Span

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BLOCK_SIZE = 16
HEADS = [(32, 8, 128), (64, 8, 128), (16, 16, 128), (32, 8, 64), (8, 1, 80)]
# (rows, context): decodes first
SHAPES = {
    "one": [(1, 1)],
    "decodes": [(1, 1), (1, 16), (1, 17), (1, 333), (1, 1025), (1, 4096)],
    "many": [(1, 100 + 7 * index) for index in range(96)],
    "fresh": [(700, 700)],
    "mixed": [(1, 3), (1, 2000), (7, 7), (100, 1100), (129, 130), (513, 900)],
}


def _batch(shape, num_kv_heads: int, dim: int, dtype: torch.dtype):
    """A cache that holds each sequence's earlier tokens among leavings, and the rows to come."""
    num_blocks = sum(-(-context // BLOCK_SIZE) for _, context in shape) + 8
    device = torch.device("cuda")
    cache = PagedKVCache([LayerGeometry(num_kv_heads, dim, dim)], num_blocks, BLOCK_SIZE, dtype, device)
    for pages in (cache.keys[0], cache.values[0]):
        pages.copy_(torch.full(pages.shape, float("nan"), device=device).to(dtype))
    free = list(range(num_blocks))
    random.shuffle(free)
    spans, first_row = [], 0
    for rows, context in shape:
        table = [free.pop() for _ in range(-(-context // BLOCK_SIZE))]
        spans.append(Span(first_row, rows, context, table, 0))
        first_row += rows
    return cache, spans


def _dense(query, keys, values, scale: float, window: int | None) -> torch.Tensor:
    rows, context = query.shape[0], keys.shape[0]
    group = query.shape[1] // keys.shape[1]
    keys, values = (each.float().repeat_interleave(group, 1) for each in (keys, values))
    scores = torch.einsum("rhd,chd->hrc", query.float(), keys) * scale
    ends = torch.arange(context - rows, context, device="cuda")[:, None]
    columns = torch.arange(context, device="cuda")
    hidden = columns > ends
    if window is not None:
        hidden |= columns <= ends - window
    return torch.einsum("hrc,chd->rhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), values)


@pytest.mark.parametrize("is_fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("shape", list(SHAPES))
def test_equals_dense_attention(shape, heads, window, is_fp8) -> None:
    from longshore_server.native.attention.triton_context import make_context

    num_heads, num_kv_heads, dim = heads
    dtype = torch.float8_e4m3fn if is_fp8 else torch.bfloat16
    cache, spans = _batch(SHAPES[shape], num_kv_heads, dim, dtype)
    if is_fp8:
        cache.scales[0].key.uniform_(0.01, 0.05)
        cache.scales[0].value.uniform_(0.01, 0.05)
    sequences, rows = [], []
    for span in spans:
        keys, values = (
            torch.randn(span.context_len, num_kv_heads, dim, device="cuda").bfloat16() for _ in range(2)
        )
        stored = [
            _stored(each, scale, is_fp8)
            for each, scale in ((keys, cache.scales[0].key), (values, cache.scales[0].value))
        ]
        table = torch.tensor(span.block_table, device="cuda")
        earlier = torch.arange(span.context_len - span.num_rows, device="cuda")
        for pages, each in zip((cache.keys[0], cache.values[0]), stored, strict=True):
            width = pages[0, 0, 0].nbytes
            raw = pages.view(torch.uint8).view(*pages.shape[:-1], width)
            wanted = each.contiguous().view(torch.uint8).view(-1, num_kv_heads, width)
            raw[table[earlier // BLOCK_SIZE], earlier % BLOCK_SIZE] = wanted[: len(earlier)]
        query = torch.randn(span.num_rows, num_heads, dim, device="cuda").bfloat16()
        sequences.append((query, *stored))
        rows.append((query, keys[-span.num_rows :], values[-span.num_rows :]))
    decodes = [span for span in spans if span.num_rows == 1]
    layout = BatchLayout(decodes, spans[len(decodes) :], BLOCK_SIZE)
    columns = [torch.cat(each) for each in zip(*rows, strict=True)]
    output = make_context(cache, layout).attend(0, *columns, dim**-0.5, window)
    expected = torch.cat(
        [
            _dense(
                query,
                keys.float() * (cache.scales[0].key[:, None] if is_fp8 else 1.0),
                values.float() * (cache.scales[0].value[:, None] if is_fp8 else 1.0),
                dim**-0.5,
                window,
            )
            for query, keys, values in sequences
        ]
    )
    error = (output.float() - expected).norm() / expected.norm()
    assert error < 1e-2, error


def _stored(values: torch.Tensor, scales: torch.Tensor, is_fp8: bool) -> torch.Tensor:
    if not is_fp8:
        return values
    return (values.float() / scales[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn)


@pytest.mark.parametrize("num_rows", [513, 1024])
def test_whole_prompts_equal_dense_attention_by_each_backend(num_rows) -> None:
    from longshore_server.native.attention import triton_context

    query = torch.randn(num_rows, 16, 128, device="cuda").bfloat16()
    key, value = (torch.randn(num_rows, 4, 128, device="cuda").bfloat16() for _ in "kv")
    expected = _dense(query, key, value, 0.1, None)
    triton_context._met_shapes.clear()
    for _ in ("flash", "cudnn", "cudnn"):
        output = triton_context.fresh_attention(query, key, value, 0.1)
        assert output.shape == query.shape
        assert (output.float() - expected).norm() / expected.norm() < 1e-2


@pytest.mark.parametrize("rows", [1, 32])
def test_splits_are_added_up_in_the_same_order_every_time(rows) -> None:
    from longshore_server.native.attention.kv_cache import KVScales
    from longshore_server.native.attention.triton_decode import decode_attention

    query = torch.randn(rows, 32, 128, device="cuda").bfloat16()
    pages = [torch.randn(rows * 130, BLOCK_SIZE, 8, 128, device="cuda").bfloat16() for _ in "kv"]
    tables = torch.randperm(rows * 130, device="cuda").to(torch.int32).view(rows, 130)
    lens = torch.randint(0, 130 * BLOCK_SIZE, (rows,), device="cuda")
    scales = KVScales(torch.ones(8, device="cuda"), torch.ones(8, device="cuda"))
    arrivals = torch.zeros(rows * 8, dtype=torch.int32, device="cuda")
    outputs = []
    for _ in range(50):
        output = torch.full_like(query, float("nan"))
        numbers = torch.arange(rows, device="cuda")
        decode_attention(query, *pages, tables, numbers, lens, scales, 0.1, None, output, arrivals)
        outputs.append(output)
    assert all(torch.equal(output, outputs[0]) for output in outputs) and outputs[0].isfinite().all()
    assert not arrivals.any()


def test_decodes_of_any_number_have_one_kernel() -> None:
    """Compiling one takes half a second, in the step that needs it."""
    from longshore_server.native.attention.kv_cache import KVScales
    from longshore_server.native.attention.triton_decode import _decode_kernel, decode_attention

    pages = [torch.randn(80, BLOCK_SIZE, 8, 128, device="cuda").bfloat16() for _ in "kv"]
    scales = KVScales(torch.ones(8, device="cuda"), torch.ones(8, device="cuda"))
    kernels = _decode_kernel.device_caches[torch.cuda.current_device()][0]
    counts = []
    for rows in (1, 3, 16, 20, 70):
        query = torch.randn(rows, 48, 128, device="cuda").bfloat16()  # heads that no other test has
        tables = torch.arange(rows, device="cuda", dtype=torch.int32)[:, None]
        lens = torch.full((rows,), BLOCK_SIZE, device="cuda")
        numbers, output = torch.arange(rows, device="cuda"), torch.empty_like(query)
        decode_attention(query, *pages, tables, numbers, lens, scales, 0.1, None, output)
        counts.append(len(kernels))
    assert counts == [counts[0]] * len(counts)


PRODUCT_HEADS = [(64, 8, 128), (32, 8, 128), (28, 4, 128), (16, 16, 128), (32, 8, 64), (16, 1, 64)]
PRODUCT_CONTEXTS = {
    "one": [300],
    "long": [1, 5000],
    "few": [2, 16, 17, 64, 65, 66, 0],
    "many": [*(1 + 21 * index for index in range(37)), 0, 9000, 0],
}
PRODUCT_FORMS = ["plain", "scaled", "in parts", "normed"]


def _product(form: str, num_rows: int, heads: tuple[int, int, int]):
    from longshore_server.native.attention.interface import QkvProduct
    from longshore_server.native.model.fp8 import ScaledOutput

    num_heads, num_kv_heads, dim = heads
    shape = (num_rows, (num_heads + 2 * num_kv_heads) * dim)
    channels, norms = ScaledOutput(torch.randn(shape, device="cuda").bfloat16()), None
    if form == "scaled":
        scales = torch.rand(num_rows, device="cuda") + 0.5, torch.rand(shape[1], device="cuda") + 0.5
        channels = ScaledOutput(channels.values, *scales, torch.randn(shape[1], device="cuda").bfloat16())
    elif form == "in parts":
        channels = ScaledOutput(torch.randn(2, *shape, device="cuda"))
    elif form == "normed":
        norms = (*(torch.rand(2, dim, device="cuda").bfloat16() + 0.5), 1e-5)
    angles = torch.rand(num_rows, dim // 2, device="cuda").repeat(1, 2) * 6
    return QkvProduct(
        channels, angles.cos().bfloat16(), angles.sin().bfloat16(), num_heads, num_kv_heads, norms
    )


@pytest.mark.parametrize("form", PRODUCT_FORMS)
@pytest.mark.parametrize("window", [None, 1, 100])
@pytest.mark.parametrize("heads", PRODUCT_HEADS, ids=str)
@pytest.mark.parametrize("contexts", list(PRODUCT_CONTEXTS))
def test_products_are_attended_as_their_heads_are(contexts, heads, window, form) -> None:
    """Whose keys and values stand in the cache before dense attention; stale memory is NaN."""
    from longshore_server.native.attention.triton_context import TritonContext, make_context
    from longshore_server.native.model.fused_ops import split_qkv

    num_heads, num_kv_heads, dim = heads
    lens = PRODUCT_CONTEXTS[contexts]
    cache, spans = _batch([(1, context) for context in lens], num_kv_heads, dim, torch.bfloat16)
    for span in spans:
        old = torch.arange(max(span.context_len - 1, 0), device="cuda")
        table = torch.tensor([*span.block_table, 0], device="cuda")
        for pages in (cache.keys[0], cache.values[0]):
            drawn = torch.randn(len(old), num_kv_heads, dim, device="cuda").bfloat16()
            pages[table[old // BLOCK_SIZE], old % BLOCK_SIZE] = drawn
    tables = make_context(
        cache, BatchLayout([span for span in spans if span.context_len], [], BLOCK_SIZE)
    ).tables
    places = torch.full((len(lens),), -1, dtype=torch.int64, device="cuda")
    real = torch.tensor([context > 0 for context in lens], device="cuda")
    places[real] = tables.slots
    rows = torch.zeros_like(places)
    rows[real] = tables.decodes.table_rows
    all_lens = torch.tensor(lens, device="cuda")
    arrivals = torch.zeros(len(lens) * num_kv_heads, dtype=torch.int32, device="cuda")
    tables = dataclasses.replace(
        tables,
        slots=places,
        num_decodes=len(lens),
        decodes=DecodeRows(rows, all_lens, all_lens),
        arrivals=arrivals,
    )
    product = _product(form, len(lens), heads)
    before = [pages.clone() for pages in (cache.keys[0], cache.values[0])]
    context = TritonContext(cache, tables)
    assert context.takes(0, product)
    torch.cuda.synchronize()
    output = context.attend_product(0, product, dim**-0.5, window)
    mine = [pages.clone() for pages in (cache.keys[0], cache.values[0])]
    for pages, kept in zip((cache.keys[0], cache.values[0]), before, strict=True):
        pages.copy_(kept)
    query, *_ = split_qkv(
        product.channels,
        product.cos,
        product.sin,
        num_heads,
        num_kv_heads,
        product.norms,
        target=context.kv_target(0),
        keep_rows=False,
    )
    for pages, written, kept in zip((cache.keys[0], cache.values[0]), mine, before, strict=True):
        near = torch.isclose(written.float(), pages.float(), rtol=0.02, atol=0.02, equal_nan=True)
        assert near.all()
        assert ((written.view(torch.int16) != kept.view(torch.int16)).any((2, 3)).sum()) <= len(tables.slots)
    for row, span in enumerate(spans):
        if not span.context_len:
            assert not output[row].any()
            continue
        tokens = torch.arange(span.context_len, device="cuda")
        table = torch.tensor(span.block_table, device="cuda")
        keys, values = (
            pages[table[tokens // BLOCK_SIZE], tokens % BLOCK_SIZE]
            for pages in (cache.keys[0], cache.values[0])
        )
        expected = _dense(query[row : row + 1], keys, values, dim**-0.5, window)
        error = (output[row : row + 1].float() - expected).norm() / expected.norm()
        assert error < 1e-2, (row, error)
    assert not arrivals.any()
    for _ in range(20):
        again = context.attend_product(0, product, dim**-0.5, window)
        assert torch.equal(again, output)
