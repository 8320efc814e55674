"""Fused layers and FP8 weights against the plain model, on their torch references."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from longshore_server.native import EngineConfig, NativeEngine
from longshore_server.native.attention.interface import CONTEXT_KEYWORD
from longshore_server.native.attention.probe import ProbeContext, probe_geometries
from longshore_server.native.errors import ConfigError
from longshore_server.native.model import build, fp8, fuse, fused_ops, products
from longshore_server.native.model.fp8 import Fp8Rows, ScaledOutput
from longshore_server.native.model.load import load_model

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "qwen3-mixed")
PROMPTS = [[5, 6, 7], [11] * 40, list(range(20, 90))]


def _model(folder, **engine) -> torch.nn.Module:
    return load_model(EngineConfig(model=str(folder), **engine)).model


# --- fused layers ---


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_engine_answers_like_the_oracle(family, make_engine, oracle, greedy) -> None:
    engine = make_engine(family, fuse_layers=True, max_num_batched_tokens=32)
    assert isinstance(engine_model(engine), fuse.FusedDecoder)
    answers = engine.generate(PROMPTS, greedy(16, ignore_eos=True))
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = torch.tensor([prompt])
        expected = oracle(family).generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False, eos_token_id=None
        )
        assert answer == expected[0, len(prompt) :].tolist()


ROPES = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "longrope": {"factor": 4.0, "original_max_position_embeddings": 256},
}  # fmt: skip


@pytest.mark.parametrize("rope_type", ROPES)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_angles_are_those_of_the_model(family, rope_type, model_folder) -> None:
    rope = {"rope_type": rope_type, "rope_theta": 1e4, **ROPES[rope_type]}
    config = AutoConfig.from_pretrained(model_folder(family), max_position_embeddings=256)
    if rope_type == "longrope":
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        rope |= {"short_factor": [1.5] * (head_dim // 2), "long_factor": [3.0] * (head_dim // 2)}
    config.rope_parameters = rope
    rotary = AutoModelForCausalLM.from_config(config).model.rotary_emb
    assert rotary.rope_type == rope_type
    positions = torch.randperm(256)
    for dtype in (torch.float32, torch.bfloat16):
        expected = rotary(torch.zeros(1, dtype=dtype), positions[None])
        angles = fused_ops.rotary_angles(positions, rotary.inv_freq, rotary.attention_scaling, dtype)
        assert all(torch.equal(a, b[0]) for a, b in zip(angles, expected, strict=True))


def engine_model(engine: NativeEngine) -> torch.nn.Module:
    return engine._runner.model.model


@pytest.mark.parametrize("quantization", ["none", "fp8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_layer_computes_before_the_others_have_weights(
    family, quantization, model_folder, monkeypatch
) -> None:
    filled, outputs = [], []
    finish_layer = build.LayerFinisher.finish_layer
    monkeypatch.setattr(
        build.LayerFinisher,
        "finish_layer",
        lambda self, index: filled.append(index) or finish_layer(self, index),
    )

    def on_first_layer(alone) -> None:
        assert filled == [0]
        probe, token = ProbeContext(), torch.zeros(1, 3, dtype=torch.long)
        output = alone(token, position_ids=token, **{CONTEXT_KEYWORD: probe})
        assert [*probe.geometries.values()] * 2 == alone.model.kv_geometries
        outputs.append((alone, output.logits))

    config = EngineConfig(model=str(model_folder(family)), fuse_layers=True, quantization=quantization)
    loaded = load_model(config, on_first_layer=on_first_layer)
    ((alone, logits),) = outputs
    assert logits.shape == (1, 3, loaded.vocab_size) and not logits.any()
    assert [*alone.model.layers] == [loaded.model.model.layers[0]] * 2
    assert loaded.model.model.kv_geometries == probe_geometries(
        loaded.model, loaded.num_layers, torch.device("cpu")
    )


def test_a_plain_model_has_no_first_layer_alone(model_folder) -> None:
    told = []
    load_model(EngineConfig(model=str(model_folder("llama"))), on_first_layer=told.append)
    assert not told


def test_a_plain_model_stays_plain_on_the_cpu_unless_asked(model_folder) -> None:
    assert not isinstance(_model(model_folder("llama")).model, fuse.FusedDecoder)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "gemma", "architectures": ["GemmaForCausalLM"], "head_dim": 16},  # its norm adds one
        {"model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"]},  # norms after the blocks
        {"hidden_act": "gelu"},
        {"model_type": "granite", "architectures": ["GraniteForCausalLM"], "residual_multiplier": 0.5},
    ],
    ids=["gemma", "olmo2", "gelu", "granite"],
)
def test_layers_that_do_not_match_stay_plain_and_right(changes, model_folder, tmp_path, greedy) -> None:
    raw = json.loads((model_folder("llama") / "config.json").read_bytes()) | changes
    (tmp_path / "config.json").write_text(json.dumps(raw))
    torch.manual_seed(3)
    plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).eval()
    plain.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    engine = NativeEngine(EngineConfig(model=str(tmp_path), fuse_layers=True, num_kv_blocks=64))
    assert not isinstance(engine_model(engine), fuse.FusedDecoder)
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = plain.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=10,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert engine.generate(ids.tolist(), greedy(10, ignore_eos=True))[0] == expected[0, 4:].tolist()


def test_fusing_is_not_called_batch_invariant(make_engine) -> None:
    assert not make_engine("llama", fuse_layers=True).batch_invariant
    with pytest.raises(ConfigError, match="batch_invariant"):
        make_engine("llama", fuse_layers=True, batch_invariant=True)


# --- FP8 ---


def test_quantized_rows_are_within_half_a_step() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(40, 300) * torch.logspace(-6, 3, 40)[:, None]
    rows = fp8.quantize_rows(matrix)
    # e4m3 has three bits behind the point: half a step is a sixteenth, below the smallest normal a constant
    bound = matrix.abs() / 16 + rows.scales[:, None] * 2**-10
    assert bool(((rows.dequantize() - matrix).abs() <= bound * 1.001).all())
    assert torch.equal(rows.values.float().abs().amax(dim=1), torch.full((40,), fp8.FP8_MAX))


def test_a_row_of_zeros_and_one_of_huge_values_are_finite() -> None:
    matrix = torch.stack([torch.zeros(32), torch.full((32,), 3e38)])
    dequantized = fp8.quantize_rows(matrix).dequantize()
    assert torch.equal(dequantized[0], matrix[0])
    assert torch.allclose(dequantized[1], matrix[1])


def test_product_of_merged_layers_equals_the_dequantized_one() -> None:
    torch.manual_seed(1)
    layers = [torch.nn.Linear(64, width, bias=width == 32) for width in (48, 32)]
    merged = products.make_product(layers, to_fp8=True)
    inputs = torch.randn(5, 64)
    output = merged(inputs).resolve(torch.float32)
    rows = fp8.quantize_rows(inputs).dequantize()
    expected = [
        rows @ fp8.quantize_rows(each.weight).dequantize().t() + (0 if each.bias is None else each.bias)
        for each in layers
    ]
    torch.testing.assert_close(output, torch.cat(expected, dim=1), rtol=1e-4, atol=1e-5)


def test_a_layer_whose_sides_fp8_cannot_take_stays_plain() -> None:
    assert not products.can_be_fp8(torch.nn.Linear(40, 64))
    assert isinstance(products.make_product([torch.nn.Linear(40, 64)], True), products.PlainProduct)


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_and_unfused_fp8_agree(family, model_folder, make_engine, greedy) -> None:
    """The same rounding by two ways: scales in the next operation, and scales in the layer itself."""
    params = greedy(8, ignore_eos=True)
    fused = make_engine(family, quantization="fp8").generate(PROMPTS, params)
    unfused = make_engine(family, quantization="fp8", fuse_layers=False).generate(PROMPTS, params)
    assert fused == unfused


def test_fp8_weights_take_half_the_memory_and_spare_head_and_embedding(model_folder) -> None:
    model = _model(model_folder("llama"), quantization="fp8", dtype="bfloat16")
    assert model.lm_head.weight.dtype == model.model.embed_tokens.weight.dtype == torch.bfloat16
    layer = model.model.layers[0]
    weights = [layer.self_attn.qkv, layer.self_attn.output, layer.mlp.gate_up, layer.mlp.down]
    assert all(each.weight.dtype == torch.float8_e4m3fn for each in weights)
    assert not any(p.dim() > 1 for p in layer.parameters())  # nothing is left in bf16


def test_the_next_operation_applies_the_scales() -> None:
    torch.manual_seed(2)
    values, rows, channels = torch.randn(4, 64), torch.rand(4) + 0.5, torch.rand(64) + 0.5
    bias = torch.randn(64)
    scaled = ScaledOutput(values, rows, channels, bias)
    plain = ScaledOutput(values * rows[:, None] * channels + bias)
    silu = [fused_ops.silu_mul(x, torch.float32, False) for x in (scaled, plain)]
    torch.testing.assert_close(*silu)
    normed = [fused_ops.add_rms_norm(x, None, torch.ones(64), 1e-6, False)[0] for x in (scaled, plain)]
    torch.testing.assert_close(*normed)
    cos, sin = torch.rand(4, 16), torch.rand(4, 16)
    heads = [fused_ops.split_qkv(x, cos, sin, 2, 1, None) for x in (scaled, plain)]
    torch.testing.assert_close(*heads)
    assert isinstance(fused_ops.silu_mul(plain, torch.float32, True), Fp8Rows)


def test_who_reads_a_product_adds_its_parts_up() -> None:
    torch.manual_seed(2)
    parts, rows, channels, bias = torch.randn(3, 4, 64), torch.rand(4), torch.rand(64), torch.randn(64)
    for others in ((), (rows, channels), (rows, channels, bias)):
        cut, whole = ScaledOutput(parts, *others), ScaledOutput(parts.sum(0), *others)
        assert (cut.num_parts, whole.num_parts) == (3, 1)
        assert torch.equal(cut.resolve(torch.float32), whole.resolve(torch.float32))
        residual = torch.randn(4, 64)
        normed = [fused_ops.add_rms_norm(x, residual, torch.ones(64), 1e-6, False) for x in (cut, whole)]
        assert all(map(torch.equal, *normed))


def test_fp8_settings_that_cannot_be() -> None:
    for settings in (
        {"quantization": "int3"},
        {"quantization": "fp8", "dtype": "float16"},
        {"quantization": "fp8", "device": "cuda", "dtype": "float32"},
    ):
        with pytest.raises(ConfigError, match="quantization"):
            EngineConfig(model="m", **settings)
    with pytest.raises(ConfigError, match="batch_invariant"):
        EngineConfig(model="m", quantization="fp8", batch_invariant=True)
    with pytest.raises(ConfigError, match="batch_invariant"):
        EngineConfig(model="m", quantization="fp8", fuse_layers=False, batch_invariant=True)
