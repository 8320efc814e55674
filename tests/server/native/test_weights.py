"""Loading: equal to transformers' own, sharded or not; every kind of damage is one clear line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from longshore_server.native import EngineConfig, NativeEngine
from longshore_server.native.errors import ModelLoadError
from longshore_server.native.model import stream
from longshore_server.native.model.load import load_model
from longshore_server.native.model.safetensors_index import locate

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")


@pytest.fixture
def copied(model_folder, tmp_path) -> Path:
    return Path(shutil.copytree(model_folder("llama"), tmp_path / "copy"))


def _load(folder: Path, **engine: object) -> torch.nn.Module:
    return load_model(EngineConfig(model=str(folder), **engine)).model


def _refusal(folder: Path) -> str:
    with pytest.raises(ModelLoadError) as caught:
        _load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_and_buffers_equal_those_of_transformers(family, dtype, model_folder) -> None:
    expected = AutoModelForCausalLM.from_pretrained(model_folder(family), dtype=getattr(torch, dtype))
    loaded = _load(model_folder(family), dtype=dtype)
    assert dict(loaded.named_parameters()).keys() == dict(expected.named_parameters()).keys()
    for name, parameter in expected.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name
        assert loaded.get_parameter(name).dtype == parameter.dtype
    for name, buffer in expected.named_buffers():
        assert torch.equal(loaded.get_buffer(name), buffer), name


def test_tied_embeddings_share_their_memory(model_folder) -> None:
    for engine in ({}, {"load_format": "random"}, {"fuse_layers": True}):
        loaded = _load(model_folder("qwen2"), **engine)
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("family", FAMILIES)
def test_shards_read_in_pieces_equal_one_file(family, model_folder, oracle, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(stream, "PIECE_BYTES", 1000)  # no multiple of any row
    oracle(family).save_pretrained(tmp_path, max_shard_size="60KB")
    shutil.copy(model_folder(family) / "tokenizer.json", tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    whole = _load(model_folder(family))
    for name, parameter in _load(tmp_path).named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name)), name


def test_random_weights_have_the_initial_distribution_of_the_model(model_folder) -> None:
    model = _load(model_folder("llama"), load_format="random", seed=5)
    again = _load(model_folder("llama"), load_format="random", seed=5)
    layers = [layer.mlp.up_proj.weight for layer in model.model.layers]
    assert not torch.equal(layers[0], layers[1])
    assert torch.equal(layers[2], again.model.layers[2].mlp.up_proj.weight)
    assert all(0.19 < float(weight.std()) < 0.21 for weight in layers)  # initializer_range 0.2
    assert torch.equal(model.model.norm.weight, torch.ones(64))


# --- names ---


def _rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_missing_and_unexpected_names(copied) -> None:
    norm = "model.norm.weight"
    _rewrite(copied, lambda tensors: tensors.pop(norm))
    assert f"lacks 1 weights, among them {norm}" in _refusal(copied)
    _rewrite(copied, lambda tensors: tensors.update({norm: torch.ones(64), "model.extra": torch.ones(1)}))
    assert "has 1 weights that the model does not, among them model.extra" in _refusal(copied)
    _rewrite(copied, lambda tensors: tensors.pop("model.extra"))
    _rewrite(copied, lambda tensors: tensors.update({"model.rotary_emb.inv_freq": torch.ones(8)}))
    _load(copied)  # computed from the config, and carried along by older checkpoints


def test_names_of_another_model_are_one_line(copied) -> None:
    _rewrite(copied, lambda tensors: tensors.update({"model.gnorm": tensors.pop("model.norm.weight")}))
    assert "lacks 1 weights" in _refusal(copied)


def test_wrong_shape_is_named(copied) -> None:
    _rewrite(copied, lambda tensors: tensors.update({"model.norm.weight": torch.ones(63)}))
    assert "model.norm.weight in the shape [63], not [64]" in _refusal(copied)


# --- damage ---


def _sharded(folder: Path, oracle) -> Path:
    (folder / "model.safetensors").unlink()
    oracle("llama").save_pretrained(folder, max_shard_size="100KB")
    return folder / "model.safetensors.index.json"


def test_index_that_lies(copied, oracle) -> None:
    index = _sharded(copied, oracle)
    good = json.loads(index.read_bytes())
    first, *_, last = sorted(set(good["weight_map"].values()))

    def lie(change) -> str:
        bad = json.loads(json.dumps(good))
        change(bad["weight_map"])
        index.write_text(json.dumps(bad))
        return _refusal(copied)

    name = next(name for name, file in good["weight_map"].items() if file == first)
    assert f"lacks {name}" in lie(lambda names: names.update({name: last}))
    assert "outside the folder" in lie(lambda names: names.update({name: "../elsewhere.safetensors"}))
    assert "not-there.safetensors is missing" in lie(lambda names: names.update(x="not-there.safetensors"))
    index.write_text("{")
    assert "is damaged" in _refusal(copied)


def test_shard_that_is_cut_or_too_long(copied, oracle) -> None:
    _sharded(copied, oracle)
    shard = sorted(copied.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    for content in (whole[:-1], whole + b"\0", whole[:5], b"", b"\xff" * 64):
        shard.write_bytes(content)
        assert f"{shard.name} is damaged" in _refusal(copied)


def test_file_that_shrinks_while_it_is_read(copied, monkeypatch) -> None:
    places = locate(copied)
    with (copied / "model.safetensors").open("r+b") as file:
        file.truncate(10_000)
    with stream.WeightStream(places, torch.device("cpu")) as weights:
        weights.start("all", list(places))
        with pytest.raises(ModelLoadError, match="ends too early"):
            weights.take("all")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    entry=st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.sampled_from(["F32", "BF16", "X9", 3, None]),
            "shape": st.one_of(st.lists(st.integers(-1, 2**70), max_size=3), st.none(), st.just("ab")),
            "data_offsets": st.one_of(st.lists(st.integers(-8, 2**70), max_size=3), st.none()),
        },
    ),
    tail=st.binary(max_size=16),
)
def test_any_header_is_read_or_refused(entry, tail, tmp_path) -> None:
    header = json.dumps({"w": entry}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + tail)
    try:
        places = locate(tmp_path)
    except ModelLoadError as error:
        assert "damaged" in str(error)
    else:
        assert places["w"].num_bytes == len(tail)


def test_a_refused_model_leaves_no_thread_behind(copied) -> None:
    import threading

    before = threading.active_count()
    _rewrite(copied, lambda tensors: tensors.pop("model.norm.weight"))
    _refusal(copied)
    NativeEngine(EngineConfig(model=str(copied), load_format="random", num_kv_blocks=64))
    assert threading.active_count() == before
