"""The export: parity with torch for every known family, refusals by name, and bundles that load."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from transformers import GPT2Config, LlamaConfig, MistralConfig

from bundles import snapshot
from longshore.bundle import load_bundle, model_digest
from longshore.errors import BundleError, ExportError, ParityError, UnsupportedModelError
from longshore.signing import PrivateKey
from longshore_export import verify
from longshore_export.bundle import SigningKey, export_student
from longshore_export.checkpoint import load_checkpoint
from longshore_export.graph import build_graph
from longshore_export.shape import read_shape
from longshore_export.verify import MAX_LOGIT_DIFFERENCE, NUM_GREEDY_TOKENS, check_parity
from tiny_models import SIZES, config_of, write_model

KINDS = (
    "llama",
    "llama-tied",
    "llama-biased",
    "llama-rope",
    "llama-one-layer",
    "mistral",
    "qwen2",
    "qwen3",
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("llama"), config_of("llama-tied"), seed=1)


@pytest.mark.parametrize("kind", KINDS)
def test_graph_and_torch_agree(tmp_path: Path, kind: str) -> None:
    exported = export_student(write_model(tmp_path / kind, config_of(kind), seed=1), tmp_path / "bundle")
    assert exported.parity.max_logit_difference <= MAX_LOGIT_DIFFERENCE
    assert exported.parity.num_greedy_tokens == 4 * NUM_GREEDY_TOKENS
    manifest = load_bundle(tmp_path / "bundle")
    assert manifest == exported.manifest
    assert manifest.model_digest == model_digest(tmp_path / kind)
    assert manifest.variants[0].graph == "built"


def _without_rope(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "do_rotary":
                attribute.i = 0


def _with_other_weight(model: onnx.ModelProto) -> None:
    weight = next(item for item in model.graph.initializer if item.name == "layer1.down.weight")
    weight.raw_data = weight.raw_data[:-4] + b"\x00\x00\x80\x40"


@pytest.mark.parametrize("spoil", [_without_rope, _with_other_weight])
def test_a_wrong_graph_fails_the_check(
    llama: Path, tmp_path: Path, spoil: Callable[[onnx.ModelProto], None]
) -> None:
    checkpoint = load_checkpoint(llama)
    model = build_graph(checkpoint.shape, checkpoint.weights, checkpoint.cos, checkpoint.sin)
    spoil(model)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ParityError):
        check_parity(tmp_path / "model.onnx", checkpoint)


def test_no_bundle_is_written_where_parity_fails(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "MAX_LOGIT_DIFFERENCE", 0.0)
    with pytest.raises(ParityError):
        export_student(llama, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_the_same_model_gives_the_same_bytes(llama: Path, tmp_path: Path) -> None:
    export_student(llama, tmp_path / "one", name="same")
    export_student(llama, tmp_path / "two", name="same")
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")


def test_a_shorter_context_is_built_in(llama: Path, tmp_path: Path) -> None:
    assert export_student(llama, tmp_path / "bundle", max_tokens=100).manifest.kv.max_tokens == 100
    with pytest.raises(UnsupportedModelError, match="context"):
        export_student(llama, tmp_path / "other", max_tokens=257)


def test_a_signed_bundle_verifies(llama: Path, tmp_path: Path) -> None:
    key = PrivateKey.generate()
    export_student(llama, tmp_path / "bundle", signing_key=SigningKey("ops", key))
    assert load_bundle(tmp_path / "bundle", trusted_keys={"ops": key.public_key}).key_id == "ops"
    with pytest.raises(BundleError):
        load_bundle(tmp_path / "bundle", trusted_keys={"ops": PrivateKey.generate().public_key})


def test_out_is_replaced_only_where_it_is_a_bundle(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(ExportError, match="not a bundle"):
        export_student(llama, out)
    assert (out / "mine.txt").read_text() == "keep"
    (out / "mine.txt").unlink()
    export_student(llama, out)
    assert export_student(llama, out, version=2).manifest.version == 2


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (GPT2Config(), "gpt2"),
        (LlamaConfig(**SIZES, hidden_act="gelu"), "silu"),
        (LlamaConfig(**SIZES, head_dim=12), "head_dim"),
        (MistralConfig(**SIZES, sliding_window=64), "sliding"),
        (
            LlamaConfig(**SIZES, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            "RoPE",
        ),
    ],
)
def test_what_the_graph_would_not_carry_out_is_refused(config: Any, word: str) -> None:
    with pytest.raises(UnsupportedModelError, match=word):
        read_shape(config)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(llama: Path, tmp_path: Path, name: str) -> None:
    for path in llama.iterdir():
        if path.name != name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ExportError, match=r"config.json|safetensors|tokenizer.json"):
        export_student(tmp_path, tmp_path / "bundle")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer_config.json"])
def test_a_damaged_file_is_a_typed_error(llama: Path, tmp_path: Path, name: str) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in llama.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    (model / name).write_bytes(b"{ not this")
    with pytest.raises(ExportError):
        export_student(model, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_eos_ids_may_be_several(llama: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in llama.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 3]}))
    assert export_student(model, tmp_path / "bundle").manifest.eos_token_ids == (1, 3)
