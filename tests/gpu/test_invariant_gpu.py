"""The batch-invariant mode on a GPU: kernels and whole answers are equal to the last bit in any company."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from longshore_server.native import EngineConfig, NativeEngine, SamplingParams
from longshore_server.native.attention.kv_cache import LayerGeometry, PagedKVCache
from longshore_server.native.attention.layout import BatchLayout, Span

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# --- kernels ---

ROWS = (1, 7, 64, 130, 1024)
SIDES = [(4096, 1024), (1001, 2816), (300, 97), (128, 64)]  # outputs, inputs
TYPES = [torch.bfloat16, torch.float16, torch.float8_e4m3fn]


def _factors(num_outputs: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(num_outputs + width)
    sides = (max(ROWS), width), (num_outputs, width)
    rows, weight = (torch.randn(*side, device="cuda").to(dtype) for side in sides)
    return rows, weight, torch.randn(num_outputs, device="cuda").bfloat16()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("sides", SIDES, ids=str)
def test_products_are_near_float32(sides, dtype) -> None:
    from longshore_server.native.gemm.triton_invariant import multiply

    rows, weight, bias = _factors(*sides, dtype)
    expected = rows.double() @ weight.double().t()
    tolerance = 2e-2 if dtype == torch.float8_e4m3fn else 4e-3  # sums of e4m3 keep fewer bits
    for num_rows in ROWS:
        for added in (None, bias):
            output = multiply(rows[:num_rows], weight, added, torch.bfloat16).double()
            wanted = expected[:num_rows] + (0 if added is None else added.double())
            assert (output - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("sides", SIDES, ids=str)
def test_a_row_of_a_product_is_the_same_among_any_others(sides, dtype) -> None:
    from longshore_server.native.gemm.triton_invariant import multiply

    rows, weight, bias = _factors(*sides, dtype)
    whole = multiply(rows, weight, bias, torch.bfloat16)
    for num_rows in ROWS:
        for first in (0, 1, 63, 200):
            part = slice(first, first + num_rows)
            assert torch.equal(multiply(rows[part], weight, bias, torch.bfloat16), whole[part])


@pytest.mark.parametrize("to_fp8", [False, True], ids=["bf16", "fp8"])
def test_a_row_between_two_products_is_the_same_among_any_others(to_fp8) -> None:
    from longshore_server.native.model import fused_ops
    from longshore_server.native.model.fp8 import ScaledOutput

    torch.manual_seed(1)
    num_rows, hidden, num_heads, num_kv_heads, dim = 600, 8192, 8, 2, 128
    values, residual = torch.randn(2, num_rows, hidden, device="cuda").bfloat16()
    weight = torch.rand(hidden, device="cuda").bfloat16()
    heads = torch.randn(num_rows, (num_heads + 2 * num_kv_heads) * dim, device="cuda").bfloat16()
    cos, sin = torch.randn(2, num_rows, dim, device="cuda").bfloat16()
    norms = (weight[:dim], weight[dim : 2 * dim], 1e-6)

    def outputs(part: slice) -> list[torch.Tensor]:
        x = ScaledOutput(values[part].contiguous())
        normed, total = fused_ops.add_rms_norm(x, residual[part].contiguous(), weight, 1e-6, to_fp8)
        active = fused_ops.silu_mul(x, torch.bfloat16, to_fp8)
        x = ScaledOutput(heads[part].contiguous())
        angles = (cos[part].contiguous(), sin[part].contiguous())
        split = fused_ops.split_qkv(x, *angles, num_heads, num_kv_heads, norms)
        plain = [each.dequantize() if to_fp8 else each for each in (normed, active)]
        return [*plain, total, *split]

    whole = outputs(slice(0, num_rows))
    for part in (slice(0, 1), slice(5, 69), slice(5, 70), slice(300, 599)):
        assert all(torch.equal(a, b[part]) for a, b in zip(outputs(part), whole, strict=True))


def _cuts(chosen: random.Random, total: int, most: int) -> list[int]:
    """Where a prompt of `total` rows is cut into chunks of 2 up to about `most` rows."""
    ends = [0]
    while total - ends[-1] > most + 2:
        ends.append(ends[-1] + chosen.randrange(2, most))
    return [*ends, total]


@pytest.mark.parametrize("is_fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("heads", [(32, 8, 128), (8, 8, 64), (8, 1, 80), (4, 2, 256)], ids=str)
def test_a_row_attends_the_same_however_its_prompt_is_cut(heads, window, is_fp8) -> None:
    from longshore_server.native.attention.triton_context import InvariantContext, make_context

    num_heads, num_kv_heads, dim = heads
    total, block_size, chosen = 700, 16, random.Random(dim)
    dtype = torch.float8_e4m3fn if is_fp8 else torch.bfloat16
    torch.manual_seed(dim)
    geometry = LayerGeometry(num_kv_heads, dim, dim)
    cache = PagedKVCache([geometry], 2 * (total // block_size + 1), block_size, dtype, torch.device("cuda"))
    blocks = list(range(cache.num_blocks))
    chosen.shuffle(blocks)
    table = blocks[: -(-total // block_size)]
    query = torch.randn(total, num_heads, dim, device="cuda").bfloat16()
    key, value = torch.randn(2, total, num_kv_heads, dim, device="cuda").bfloat16()

    def attend(layout: BatchLayout) -> torch.Tensor:
        context = make_context(cache, layout, InvariantContext)
        return context.attend(0, query, key, value, dim**-0.5, window)

    whole = attend(BatchLayout([], [Span(0, total, total, table, total)], block_size))
    for most in (5, 40, 130, 400):
        ends = _cuts(chosen, total, most)
        spans = [Span(start, end - start, end, table, total) for start, end in pairwise(ends)]
        assert torch.equal(attend(BatchLayout([], spans, block_size)), whole)
    single = [Span(row, 1, row + 1, table, total) for row in range(total)]
    assert torch.equal(attend(BatchLayout(single, [], block_size)), whole)


# --- the engine ---

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 32003,
    "max_position_embeddings": 4096,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "initializer_range": 0.05,
    "torch_dtype": "bfloat16",
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 100},
}
KINDS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp16": {"dtype": "float16"},
    "fp8": {"quantization": "fp8"},
    "fp8 kv": {"kv_cache_dtype": "fp8"},
    "fp8 both": {"quantization": "fp8", "kv_cache_dtype": "fp8"},
}
CASES = [("llama", kind) for kind in KINDS] + [
    ("qwen3", "bf16"),
    ("mistral", "bf16"),
    ("mistral", "fp8 both"),
]
LENGTHS = (3, 40, 9, 600, 77, 16, 31, 250)
STYLES: list[dict[str, Any]] = [
    {"temperature": 0.0, "num_logprobs": 5},
    {"temperature": 0.0},
    {"temperature": 1.0, "top_p": 0.9, "num_logprobs": 2},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 0.7, "frequency_penalty": 0.5, "num_logprobs": 0},
]
Answer = list[tuple[int | None, float | None, tuple[tuple[int, float], ...]]]


@pytest.fixture(scope="module")
def folder_of() -> Callable[[str], Path]:
    root = Path(tempfile.mkdtemp())

    def folder(family: str) -> Path:
        path = root / family
        path.mkdir(exist_ok=True)
        (path / "config.json").write_text(json.dumps(CONFIG | FAMILIES[family]))
        return path

    return folder


def _engine(folder: Path, **settings: Any) -> NativeEngine:
    defaults = {"device": "cuda", "load_format": "random", "num_kv_blocks": 1000, "max_model_len": 800}
    config = EngineConfig(model=str(folder), batch_invariant=True, **{**defaults, **settings})
    engine = NativeEngine(config)
    assert engine.batch_invariant
    return engine


def _requests() -> dict[str, tuple[list[int], SamplingParams]]:
    chosen = random.Random(5)
    requests = {}
    for index, length in enumerate(LENGTHS):
        prompt = [chosen.randrange(3, CONFIG["vocab_size"]) for _ in range(length)]
        style = STYLES[index % len(STYLES)]
        requests[f"r{index}"] = (prompt, SamplingParams(max_tokens=40, ignore_eos=True, seed=index, **style))
    return requests


def _answers(
    engine: NativeEngine,
    requests: dict[str, tuple[list[int], SamplingParams]],
    aborted: Iterable[str] = (),
) -> dict[str, Answer]:
    """Answers all together; those to be aborted are after a few steps."""
    answers: dict[str, Answer] = {name: [] for name in requests}
    for name, (prompt, params) in requests.items():
        engine.add_request(name, prompt, params)
    num_steps = 0
    while engine.has_unfinished():
        for output in engine.step():
            assert output.error is None
            if output.token_id is not None:
                answers[output.request_id].append((output.token_id, output.logprob, output.top_logprobs))
        num_steps += 1
        if num_steps == 12:
            for name in aborted:
                engine.abort(name)
    engine.check_integrity()
    engine.settle()  # nobody can draw random weights while a capture goes on
    return answers


def _alone(engine: NativeEngine) -> dict[str, Answer]:
    answers: dict[str, Answer] = {}
    for name, request in _requests().items():
        answers |= _answers(engine, {name: request})
    return answers


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_answers_are_the_same_to_the_bit_in_any_batch(family, kind, folder_of) -> None:
    folder = folder_of(family)
    alone = _alone(_engine(folder, enable_prefix_cache=False, **KINDS[kind]))
    assert all(len(answer) == 40 for answer in alone.values())
    crowd = _engine(folder, enable_prefix_cache=False, max_num_batched_tokens=256, **KINDS[kind])
    for _ in range(3):  # the later ones in captured graphs
        assert _answers(crowd, _requests()) == alone
    assert crowd._runner._graphs.captured_shapes  # type: ignore[union-attr]
    assert crowd._runner._mixed_graphs.captured_shapes  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["bf16", "fp8", "fp8 kv"])
def test_a_cached_prefix_changes_no_bit(kind, folder_of) -> None:
    folder = folder_of("llama")
    alone = _alone(_engine(folder, enable_prefix_cache=False, **KINDS[kind]))
    cached = _engine(folder, max_num_batched_tokens=256, **KINDS[kind])
    for _ in range(3):
        assert _answers(cached, _requests()) == alone
    assert cached.stats().prefix_cache_hits > 0


@pytest.mark.parametrize("kind", ["bf16", "fp8", "fp8 kv"])
def test_neighbours_that_leave_change_no_bit(kind, folder_of) -> None:
    """Some are preempted and computed again, some are aborted."""
    folder = folder_of("llama")
    alone = _alone(_engine(folder, enable_prefix_cache=False, **KINDS[kind]))
    small = _engine(folder, num_kv_blocks=56, max_num_batched_tokens=128, **KINDS[kind])
    assert _answers(small, _requests()) == alone
    assert small.stats().preemptions > 0
    gone = ("r1", "r4")
    rest = _answers(small, _requests(), aborted=gone)
    for name, answer in alone.items():
        if name in gone:
            assert rest[name] == answer[: len(rest[name])] and len(rest[name]) < len(answer)
        else:
            assert rest[name] == answer


def test_steps_that_are_not_captured_give_the_same_bits(folder_of) -> None:
    captured = _engine(folder_of("llama"))
    eager = _engine(folder_of("llama"))
    eager._runner.stay_eager()  # type: ignore[union-attr]
    for _ in range(3):
        assert _answers(captured, _requests()) == _answers(eager, _requests())
    assert captured._runner._graphs.captured_shapes  # type: ignore[union-attr]
    assert not eager._runner._graphs.captured_shapes  # type: ignore[union-attr]
