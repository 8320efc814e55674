"""The model's Triton kernels, FP8 products, fused layers and loaders on a GPU, at production shapes.

Plain functions: they run under pytest, and without it as `PYTHONPATH=server:sdk_python python
tests/gpu/test_model_gpu.py`, which prints one line for each.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("USE_HUB_KERNELS", "NO")

import torch

from longshore_server.native.attention.interface import CONTEXT_KEYWORD
from longshore_server.native.attention.kv_cache import KVScales, KVTarget
from longshore_server.native.config import EngineConfig
from longshore_server.native.gemm.multiply import multiply_by_torch
from longshore_server.native.model import fp8, fused_ops
from longshore_server.native.model.fp8 import Fp8Rows, ScaledOutput
from longshore_server.native.model.load import load_model

try:
    import pytest

    pytestmark = [
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ]
except ImportError:  # a bare GPU machine
    pass

DEVICE = "cuda"
ROWS = (1, 32, 515)
LLAMA_8B: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "eos_token_id": 2,
}  # fmt: skip
LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
}  # fmt: skip
QWEN3_8B = LLAMA_8B | {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 128, "intermediate_size": 12288,
    "vocab_size": 151936, "rms_norm_eps": 1e-6,
}  # fmt: skip
# hidden, inner, heads, kv heads, head size
SHAPES = ((4096, 14336, 32, 8, 128), (8192, 28672, 64, 8, 128))


def _scaled(num_rows: int, num_channels: int, has_scales: bool) -> ScaledOutput:
    """A linear layer's output, with or without the scales that an FP8 one leaves to the next kernel."""
    values = torch.randn(num_rows, num_channels, device=DEVICE).bfloat16()
    if not has_scales:
        return ScaledOutput(values)
    rows = torch.rand(num_rows, device=DEVICE) + 0.5
    channels = torch.rand(num_channels, device=DEVICE) + 0.5
    return ScaledOutput(values, rows, channels, torch.randn(num_channels, device=DEVICE).bfloat16())


def _to_cpu(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return x.cpu()
    if isinstance(x, Fp8Rows):
        return x.dequantize().cpu()
    if isinstance(x, ScaledOutput):
        parts = (x.values, x.row_scales, x.channel_scales, x.bias)
        return ScaledOutput(*(None if part is None else part.cpu() for part in parts))
    return x


def _error(output: Any, reference: Any) -> float:
    """Norm of the difference over the norm of the reference; NaN compares as not small."""
    mine = _to_cpu(output).double()
    expected = _to_cpu(reference).double()
    return float((mine - expected).norm() / expected.norm())


def _assert_near(output: Any, reference: Any, to_fp8: bool = False) -> None:
    """Within rounding of bf16; of e4m3, where a value on the edge may round to the other side."""
    error = _error(output, reference)
    assert error < (2e-2 if to_fp8 else 4e-3), error


def test_add_rms_norm_equals_its_reference() -> None:
    for hidden, *_ in SHAPES:
        for num_rows in ROWS:
            for has_scales, has_residual, to_fp8 in ((0, 0, 0), (0, 1, 0), (1, 1, 1), (0, 0, 1)):
                x = _scaled(num_rows, hidden, bool(has_scales))
                residual = torch.randn(num_rows, hidden, device=DEVICE).bfloat16() if has_residual else None
                weight = torch.rand(hidden, device=DEVICE).bfloat16()
                output, total = fused_ops.add_rms_norm(x, residual, weight, 1e-5, bool(to_fp8))
                expected, expected_total = fused_ops.add_rms_norm(
                    _to_cpu(x), _to_cpu(residual), weight.cpu(), 1e-5, bool(to_fp8)
                )
                _assert_near(output, expected, bool(to_fp8))
                _assert_near(total, expected_total)


def test_silu_mul_equals_its_reference() -> None:
    for _, inner, *_ in SHAPES:
        for num_rows in ROWS:
            for has_scales, to_fp8 in ((False, False), (True, True), (True, False)):
                x = _scaled(num_rows, 2 * inner, has_scales)
                output = fused_ops.silu_mul(x, torch.bfloat16, to_fp8)
                _assert_near(output, fused_ops.silu_mul(_to_cpu(x), torch.bfloat16, to_fp8), to_fp8)


def test_one_row_times_a_matrix() -> None:
    """Rows that are read whole, in pieces, and of a width that is no power of two."""
    from longshore_server.native.gemm import triton_gemv

    shapes = (
        (6144, 4096), (4096, 14336), (8192, 8192), (8192, 28672), (1024, 3584), (1024, 5120), (512, 1024),
        (512, 33000), (256, 96),
    )  # fmt: skip
    for num_outputs, width in shapes:
        for dtype in (torch.bfloat16, fp8.FP8_DTYPE):
            weight = torch.randn(num_outputs, width, device=DEVICE).to(dtype)
            row = torch.randn(1, width, device=DEVICE).to(dtype)
            bias = torch.randn(num_outputs, device=DEVICE)
            assert triton_gemv.can_multiply(row, weight)
            for each in (None, bias.bfloat16()):
                expected = torch.nn.functional.linear(
                    row.double(), weight.double(), None if each is None else each.double()
                )
                _assert_near(triton_gemv.multiply_row(row, weight, each, torch.bfloat16), expected)
    assert not triton_gemv.can_multiply(row, weight[:, :48])
    assert not triton_gemv.can_multiply(row, weight[:255])  # a program has 128 outputs of this width
    assert not triton_gemv.can_multiply(row.repeat(1, 2)[:, ::2], weight)


def test_angles_are_exact_far_into_a_context() -> None:
    frequencies = 1.0 / 500_000.0 ** (torch.arange(0, 128, 2, device=DEVICE) / 128)
    positions = torch.randint(0, 131_072, (700,), device=DEVICE)
    exact = (positions.float()[:, None] * frequencies).repeat(1, 2).double()
    angles = fused_ops.rotary_angles(positions, frequencies, 1.25, torch.float32)
    for each, expected in zip(angles, (exact.cos(), exact.sin()), strict=True):
        assert float((each.double() - 1.25 * expected).abs().max()) < 1e-6


def test_keys_and_values_reach_their_pages() -> None:
    """Written by the kernel that rotates them, or by the one that only writes: the same pages."""
    from longshore_server.native.attention.triton_write import write_kv

    num_rows, heads, kv_heads, dim = 37, 16, 4, 128
    cos, sin = (torch.rand(num_rows, dim // 2, device=DEVICE).repeat(1, 2).bfloat16() for _ in "cs")
    slots = torch.randperm(64, device=DEVICE)[:num_rows]
    slots[5] = -1
    x = _scaled(num_rows, (heads + 2 * kv_heads) * dim, True)
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        pages = [torch.zeros(4, 16, kv_heads, dim, device=DEVICE).to(dtype) for _ in range(4)]
        scales = KVScales(*(torch.rand(2, kv_heads, device=DEVICE) / 50 + 0.01).unbind())
        target = KVTarget(pages[0], pages[1], scales, slots)
        query, key, value = fused_ops.split_qkv(x, cos, sin, heads, kv_heads, None, target=target)
        write_kv(key, value, pages[2], pages[3], slots, scales)
        for mine, expected in zip(pages[:2], pages[2:], strict=True):
            assert torch.equal(mine.float(), expected.float())
        again = fused_ops.split_qkv(x, cos, sin, heads, kv_heads, None, target=target, keep_rows=False)
        assert torch.equal(again[0], query) and not again[1].numel() and not again[2].numel()


def test_split_qkv_equals_its_reference() -> None:
    for _, _, heads, kv_heads, dim in (*SHAPES, (0, 0, 14, 2, 64), (0, 0, 6, 3, 80)):
        for num_rows in ROWS:
            angles = torch.rand(num_rows, dim // 2, device=DEVICE).repeat(1, 2) * 6.28
            cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
            norms = tuple((torch.rand(2, dim, device=DEVICE) + 0.5).bfloat16().unbind())
            for has_scales in (False, True):
                x = _scaled(num_rows, (heads + 2 * kv_heads) * dim, has_scales)
                for norm in (None, (*norms, 1e-6)):
                    outputs = fused_ops.split_qkv(x, cos, sin, heads, kv_heads, norm)
                    on_cpu = None if norm is None else tuple(_to_cpu(part) for part in norm)
                    expected = fused_ops.split_qkv(_to_cpu(x), cos.cpu(), sin.cpu(), heads, kv_heads, on_cpu)
                    for mine, reference in zip(outputs, expected, strict=True):
                        _assert_near(mine, reference)


def test_quantize_rows_equals_its_reference() -> None:
    for hidden, inner, *_ in SHAPES:
        for width in (hidden, inner):
            for num_rows in ROWS:
                matrix = torch.randn(num_rows, width, device=DEVICE).bfloat16()
                output, expected = fused_ops.quantize_rows(matrix), fp8.quantize_rows(matrix.cpu())
                _assert_near(output, expected, to_fp8=True)
                _assert_near(output.scales, expected.scales)


def test_fp8_product_equals_the_dequantized_product() -> None:
    for hidden, inner, *_ in SHAPES:
        for num_out, num_in in ((hidden, hidden), (2 * inner, hidden), (hidden, inner)):
            weight = fp8.quantize_rows(torch.randn(num_out, num_in, device=DEVICE) * 0.02)
            for num_rows in (1, 7, 32, 515):
                rows = fp8.quantize_rows(torch.randn(num_rows, num_in, device=DEVICE))
                values = multiply_by_torch(rows.values, weight.values, None, torch.bfloat16)
                output = ScaledOutput(values, rows.scales, weight.scales).resolve(torch.bfloat16)
                exact = rows.dequantize().double() @ weight.dequantize().double().t()
                assert _error(output, exact) < 1e-2
    torch.cuda.empty_cache()


class CausalContext:
    """Attention of one prompt over itself, so that a forward needs neither pages nor kernels."""

    def attend(
        self,
        layer_index: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        output = torch.nn.functional.scaled_dot_product_attention(
            *(each.transpose(0, 1)[None] for each in (query, key, value)),
            is_causal=True,
            scale=scale,
            enable_gqa=True,
        )
        return output[0].transpose(0, 1)

    def check_arguments(self, arguments: dict[str, Any], attention_mask: torch.Tensor | None) -> None:
        """Nothing to check."""


def _load(settings: dict[str, Any], **engine: Any) -> torch.nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(settings))
        config = EngineConfig(model=folder, load_format="random", device=DEVICE, **engine)
        model: torch.nn.Module = load_model(config).model
        return model


@torch.inference_mode()
def _logits(model: torch.nn.Module, token_ids: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(token_ids.shape[1], device=token_ids.device)[None]
    logits: torch.Tensor = model(
        input_ids=token_ids, position_ids=positions, use_cache=False, **{CONTEXT_KEYWORD: CausalContext()}
    ).logits[0]
    return logits


def test_fused_model_equals_the_plain_one() -> None:
    """Both in bf16, and both against float32 of the same weights: fusing must not be further from it."""
    for family in (LLAMA_8B, QWEN3_8B):
        settings = family | {"num_hidden_layers": 2}
        token_ids = torch.randint(0, 1000, (1, 67), device=DEVICE)
        plain = _load(settings, fuse_layers=False)
        fused = _logits(_load(settings, fuse_layers=True), token_ids)
        bf16 = _logits(plain, token_ids)
        exact = _logits(plain.float(), token_ids)
        fused_error, plain_error = _error(fused, exact), _error(bf16, exact)
        print(
            f"        {family['model_type']}: fused {fused_error:.2e}, plain {plain_error:.2e} from float32"
        )
        assert fused_error < max(1.5 * plain_error, 1e-3)


def test_fp8_model_equals_its_reference_on_the_cpu() -> None:
    """The same FP8 weights through the same code in torch.

    Sums in another order push single activations over the edge between two e4m3 numbers. A share p of them
    pushed makes an error of sqrt(12 p) times that of the rounding itself: 0.6 times at 3%, which is what
    noise of 2^-9 does to steps of 2^-4. Wrong scales or channels make it several times as large.
    """
    for family in (LLAMA_8B, QWEN3_8B):
        settings = family | {"num_hidden_layers": 2}
        model = _load(settings, quantization="fp8")
        token_ids = torch.randint(0, 1000, (1, 67), device=DEVICE)
        output = _logits(model, token_ids)
        rounding = _error(output, _logits(_load(settings, fuse_layers=False), token_ids))
        error = _error(output, _logits(model.cpu(), token_ids.cpu()))
        print(f"        {family['model_type']}: {error:.3f} from the reference, {rounding:.3f} from bf16")
        assert error < 0.75 * rounding


def test_fused_fp8_is_as_near_to_bf16_as_unfused_fp8() -> None:
    """Random weights make e4m3 look bad, since no token stands out; trained ones have a test of their own."""
    for family in (LLAMA_8B, QWEN3_8B):
        settings = family | {"num_hidden_layers": 2}
        token_ids = torch.randint(0, 1000, (1, 67), device=DEVICE)
        exact = _logits(_load(settings, fuse_layers=False), token_ids)
        fused = _logits(_load(settings, quantization="fp8"), token_ids)
        unfused = _logits(_load(settings, quantization="fp8", fuse_layers=False), token_ids)
        errors = _error(fused, exact), _error(unfused, exact)
        print(f"        {family['model_type']}: fused {errors[0]:.3f}, unfused {errors[1]:.3f} from bf16")
        assert errors[0] < min(0.3, 1.1 * errors[1])


def test_fused_forward_replays_as_a_cuda_graph() -> None:
    for quantization in ("none", "fp8"):
        model = _load(LLAMA_8B | {"num_hidden_layers": 2}, quantization=quantization)
        token_ids = torch.randint(0, 1000, (1, 16), device=DEVICE)
        _logits(model, token_ids)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        positions = torch.arange(16, device=DEVICE)[None]
        keywords = {CONTEXT_KEYWORD: CausalContext()}
        with torch.inference_mode(), torch.cuda.graph(graph):
            output = model(input_ids=token_ids, position_ids=positions, use_cache=False, **keywords).logits[0]
        token_ids.copy_(torch.randint(0, 1000, (1, 16), device=DEVICE))
        graph.replay()
        replayed = output.clone()
        assert _error(replayed, _logits(model, token_ids)) < 1e-3
        del graph, model, output
        torch.cuda.empty_cache()


def _assert_drawn(model: Any) -> None:
    """First and last layer hold different weights of the deviation that the config asks for, 0.02."""
    first, last = (model.model.layers[index].mlp.down for index in (0, -1))
    for product in (first, last):
        weight = product.weight[:1024].float()
        if hasattr(product, "scales"):
            weight *= product.scales[:1024, None]
        assert 0.0195 < float(weight.std()) < 0.0205
    assert not torch.equal(first.weight[0].float(), last.weight[0].float())


def _timed_load(name: str, settings: dict[str, Any], **engine: Any) -> tuple[float, float, float]:
    """Seconds, peak bytes and bytes kept of a random load."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    start_s = time.perf_counter()
    model = _load(settings, **engine)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start_s
    peak, kept = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    _assert_drawn(model)
    print(f"        {name}: {seconds:.2f} s, peak {peak / 1e9:.1f} GB, kept {kept / 1e9:.1f} GB", flush=True)
    del model
    torch.cuda.empty_cache()
    return seconds, peak, kept


def test_random_8b_is_there_within_seconds() -> None:
    seconds, peak, kept = _timed_load("Llama-8B bf16", LLAMA_8B)
    assert seconds < 10
    assert peak < 1.15 * kept


def test_random_70b_in_fp8_never_stands_in_bf16() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 100e9:
        return
    seconds, peak, kept = _timed_load("Llama-70B FP8", LLAMA_70B, quantization="fp8")
    assert seconds < 25
    assert kept < 76e9
    assert peak < kept + 6e9


def test_files_give_the_weights_that_were_saved() -> None:
    """A sharded folder of a 1 GB model through pinned buffers, and its rate from the page cache."""
    settings = LLAMA_8B | {"num_hidden_layers": 2, "vocab_size": 32000}
    with tempfile.TemporaryDirectory() as folder:
        saved = _load(settings, fuse_layers=False)
        saved.save_pretrained(folder, max_shard_size="400MB")
        (Path(folder) / "tokenizer.json").write_text("{}")
        config = EngineConfig(model=folder, device=DEVICE, fuse_layers=False)
        load_model(config)
        torch.cuda.synchronize()
        start_s = time.perf_counter()
        loaded = load_model(config).model
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start_s
        num_bytes = sum(parameter.nbytes for parameter in loaded.parameters())
        print(f"        {num_bytes / 1e9:.2f} GB in {seconds:.2f} s: {num_bytes / 1e9 / seconds:.1f} GB/s")
        expected = dict(saved.named_parameters())
        for name, parameter in loaded.named_parameters():
            assert torch.equal(parameter, expected[name]), name


def main() -> int:
    """Runs every test here; prints its time, or its error, and goes on."""
    failed = 0
    print(torch.cuda.get_device_name(), torch.__version__)
    for name, test in list(globals().items()):
        if not name.startswith("test_"):
            continue
        start_s = time.perf_counter()
        try:
            test()
            torch.cuda.synchronize()
            print(f"ok      {name} {time.perf_counter() - start_s:.1f} s", flush=True)
        except Exception as error:
            failed += 1
            print(f"FAILED  {name}: {type(error).__name__}: {str(error)[:2000]}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
