"""Traced graphs: equal to built ones where both can be made, the route for other architectures, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    Phi3Config,
)

from longshore.device import DeviceSettings, Student
from longshore.device.session import DecoderSession
from longshore.errors import ConfigError, ExportError, UnsupportedModelError
from longshore.wire import TokenEvent, decode_completion_request
from longshore_export import gate_cli, verify
from longshore_export.bundle import export_student
from longshore_export.checkpoint import load_checkpoint, load_traced, open_checkpoint
from longshore_export.gate import kv_geometry
from longshore_export.graph import build_graph
from longshore_export.traced import read_traced_shape, settled_rope, trace
from longshore_export.variant import build_variant
from longshore_export.verify import MAX_LOGIT_DIFFERENCE
from tiny_models import SIZES, VOCAB_SIZE, config_of, write_model

SMALL: dict[str, Any] = SIZES | {"max_position_embeddings": 96}
GPT2: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 96,
    "eos_token_id": 1, "bos_token_id": None,
}  # fmt: skip


def tokens_of(session: DecoderSession, prompt: list[int], num_tokens: int) -> tuple[list[int], list[Any]]:
    """Greedy tokens after a prompt that is read in two pieces, and the logits of each."""
    cut = len(prompt) // 2
    session.forward(prompt[:cut], 0)
    out, logits = [], [session.forward(prompt[cut:], cut).copy()]
    for num_past in range(len(prompt), len(prompt) + num_tokens):
        out.append(int(logits[-1].argmax()))
        logits.append(session.forward([out[-1]], num_past).copy())
    return out, logits


@pytest.mark.parametrize("kind", ["llama-tied", "qwen2", "qwen3"])
def test_the_traced_graph_and_the_built_one_agree(tmp_path: Path, kind: str) -> None:
    config = config_of(kind)
    config.num_hidden_layers = 1  # tracing is slow; the next test has two layers
    config.layer_types = ["full_attention"]
    folder = write_model(tmp_path / "model", config, seed=1)
    to_build, to_trace = load_checkpoint(folder), load_traced(folder)
    built = build_graph(to_build.shape, to_build.weights, to_build.cos, to_build.sin)
    answers = []
    for name, graph in (("built", built), ("traced", trace(to_trace.model, to_trace.shape))):
        (tmp_path / name).write_bytes(graph.SerializeToString())
        session = DecoderSession(tmp_path / name, kv_geometry(to_build), num_threads=1)
        answers.append(tokens_of(session, [*range(40, 77)], 16))
    assert answers[0][0] == answers[1][0]
    for ours, theirs in zip(answers[0][1], answers[1][1], strict=True):
        assert np.abs(ours - theirs).max() <= MAX_LOGIT_DIFFERENCE


def test_another_architecture_becomes_a_bundle_that_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "NUM_GREEDY_TOKENS", 16)
    # soft caps, scaled embeddings, and a layer that looks back less far than the prompts are long
    config = Gemma2Config(**SMALL, head_dim=16, sliding_window=16, pad_token_id=0)
    folder = write_model(tmp_path / "model", config, seed=1)
    exported = export_student(folder, tmp_path / "bundle")
    assert exported.manifest.variants[0].graph == "traced"
    assert exported.parity.max_logit_difference <= MAX_LOGIT_DIFFERENCE
    assert exported.parity.num_greedy_tokens > 0
    body = (tmp_path / "bundle" / "model.onnx").read_bytes()
    assert b"site-packages" not in body and str(tmp_path).encode() not in body
    prompt = [*range(40, 70)]
    request = decode_completion_request(
        {"model": "s", "prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    )
    with Student(tmp_path / "bundle", settings=DeviceSettings(calibration_s=0.0)) as student:
        answer = [event.mark.token_id for event in student.stream(request) if isinstance(event, TokenEvent)]
    expected = AutoModelForCausalLM.from_pretrained(folder).generate(
        torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    assert answer == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("variant", "config"),
    [
        ("int4-b32", Gemma3TextConfig(**SMALL, head_dim=16, sliding_window=16, pad_token_id=0)),
        ("int8", GPT2Config(**GPT2)),
    ],
)
def test_quantized_layers_compute_what_they_should(tmp_path: Path, variant: str, config: Any) -> None:
    checkpoint = open_checkpoint(write_model(tmp_path, config, seed=1))
    built = build_variant(checkpoint, variant, tmp_path / "model.onnx")
    operators = set(built.required_operators)
    product = "MatMulNBits" if variant == "int4-b32" else "DynamicQuantizeMatMul"
    assert {f"com.microsoft:{product}", "com.microsoft:GatherBlockQuantized"} <= operators
    num_weights = sum(parameter.numel() for parameter in checkpoint.model.parameters())
    assert built.size_bytes < (1.3 if variant == "int4-b32" else 1.9) * num_weights


def test_what_cannot_be_traced_is_named(tmp_path: Path) -> None:
    mamba = MambaConfig(vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=1, eos_token_id=1)
    heads = SMALL | {"num_hidden_layers": 1, "num_key_value_heads": 4}
    ranks = {"q_lora_rank": 16, "kv_lora_rank": 16, "first_k_dense_replace": 1}
    latent = DeepseekV3Config(**heads, **ranks, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 48}
    rope |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    growing = Phi3Config(**SMALL, pad_token_id=0, rope_parameters=rope, original_max_position_embeddings=48)
    for number, (config, words) in enumerate(
        [(mamba, "max-tokens"), (latent, "several sizes"), (growing, "at most 48")]
    ):
        folder = write_model(tmp_path / str(number), config)
        with pytest.raises(UnsupportedModelError, match=words) as caught:
            open_checkpoint(folder)
        assert "\n" not in caught.value.message
    with pytest.raises(UnsupportedModelError, match="no plain keys and values"):
        open_checkpoint(tmp_path / "0", max_tokens=64)
    assert open_checkpoint(tmp_path / "2", max_tokens=48).shape.max_tokens == 48


def test_dynamic_rope_is_static_within_the_context() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = LlamaForCausalLM(LlamaConfig(**SMALL, rope_parameters=rope)).eval()
    ids = torch.arange(SMALL["max_position_embeddings"])[None]
    with torch.no_grad():
        expected = model(ids).logits
        with settled_rope(model):
            assert model.model.rotary_emb.rope_type == "default"
            assert torch.equal(model(ids).logits, expected)
    assert model.model.rotary_emb.rope_type == "dynamic"
    assert read_traced_shape(model).max_tokens == SMALL["max_position_embeddings"]


def test_a_graph_that_was_asked_for_is_not_replaced_by_the_other(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", GPT2Config(**GPT2))
    with pytest.raises(UnsupportedModelError, match="graph builder knows"):
        export_student(folder, tmp_path / "bundle", graph="built")
    with pytest.raises(ExportError, match="built graphs alone"):
        export_student(folder, tmp_path / "bundle", variant="int4-b32-p8")
    checkpoint = open_checkpoint(folder)
    names = [candidate.variant for candidate in gate_cli._candidates(checkpoint, None, [])]
    assert names[0] == "fp32" and "int4-b128" in names and not any(name.endswith("-p8") for name in names)
    with pytest.raises(ConfigError, match="--calibrate"):
        gate_cli._candidates(checkpoint, None, [object()])  # type: ignore[list-item]
