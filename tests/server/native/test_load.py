"""What can be loaded, and the one line that says why something cannot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from longshore_server.native import EngineConfig, NativeEngine
from longshore_server.native.errors import ConfigError, ModelLoadError, UnsupportedModelError


@pytest.fixture
def copied(model_folder, tmp_path) -> Path:
    return Path(shutil.copytree(model_folder("llama"), tmp_path / "model"))


def _refusal(folder: Path, kind: type[Exception] = ModelLoadError, **settings) -> str:
    with pytest.raises(kind) as caught:
        NativeEngine(EngineConfig(model=str(folder), num_kv_blocks=16, **settings))
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    return message


def _edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_wrong_path_and_missing_files(tmp_path, copied) -> None:
    assert "not a folder" in _refusal(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no config.json" in _refusal(tmp_path / "empty")
    (copied / "tokenizer.json").unlink()
    assert "no tokenizer.json" in _refusal(copied)


def test_a_damaged_config(copied) -> None:
    (copied / "config.json").write_text("{")
    assert "cannot be read" in _refusal(copied)
    (copied / "config.json").write_text("[]")
    assert "not a JSON object" in _refusal(copied)
    (copied / "config.json").write_text('{"model_type": "no-such-model"}')
    assert "no-such-model" in _refusal(copied)


def test_pickles_are_refused_and_never_opened(copied) -> None:
    weights = copied / "model.safetensors"
    torch.save({"x": torch.zeros(1)}, copied / "pytorch_model.bin")
    weights.unlink()
    assert "only safetensors" in _refusal(copied)
    (copied / "pytorch_model.bin").unlink()
    assert "no .safetensors" in _refusal(copied)


def test_code_in_the_folder_is_refused(copied) -> None:
    _edit_config(copied, auto_map={"AutoModelForCausalLM": "modeling.Evil"})
    (copied / "modeling.py").write_text("raise SystemExit('ran')")
    assert "code of its own" in _refusal(copied)
    assert "code of its own" in _refusal(copied, load_format="random")


def test_damaged_and_missing_weights(copied) -> None:
    weights = copied / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "is damaged" in _refusal(copied)
    weights.write_bytes(whole)
    _edit_config(copied, num_hidden_layers=4)
    assert "lacks" in _refusal(copied)
    _edit_config(copied, num_hidden_layers=3, vocab_size=299)
    assert "in the shape" in _refusal(copied)


def test_sharded_weights_give_the_same_answers(model_folder, copied, oracle, make_engine, greedy) -> None:
    (copied / "model.safetensors").unlink()
    oracle("llama").save_pretrained(copied, max_shard_size="100KB")
    assert len(list(copied.glob("*.safetensors"))) > 2
    sharded = NativeEngine(EngineConfig(model=str(copied), num_kv_blocks=64))
    whole = make_engine("llama")
    assert sharded.generate([[5, 6, 7]], greedy()) == whole.generate([[5, 6, 7]], greedy())


def test_random_weights_need_a_config_alone_and_repeat(copied, tmp_path, greedy) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(copied / "config.json", bare)

    def answer(seed: int) -> list[list[int]]:
        config = EngineConfig(model=str(bare), load_format="random", seed=seed, num_kv_blocks=64)
        return NativeEngine(config).generate([[5, 6, 7]], greedy(ignore_eos=True))

    state = torch.random.get_rng_state()
    assert answer(1) == answer(1) != answer(2)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "head_dim": 16}, "softcap"),
        ({"model_type": "t5"}, ""),
        ({"model_type": "mamba", "state_size": 4}, ""),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic RoPE"),
        (
            {"model_type": "gpt_oss", "head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1},
            "s_aux",
        ),
    ],
    ids=str,
)
def test_unsupported_models_are_refused_at_start(changes, words, copied) -> None:
    _edit_config(copied, **changes)
    assert words in _refusal(copied, ModelLoadError, load_format="random")


def test_lengths_that_cannot_be(copied) -> None:
    assert "256" in _refusal(copied, max_model_len=257)
    assert "KV cache" in _refusal(copied, ConfigError, max_model_len=250, block_size=8)
    engine = NativeEngine(EngineConfig(model=str(copied), num_kv_blocks=16, block_size=8))
    assert engine.max_model_len == 128


def test_eos_comes_from_the_generation_config_first(copied) -> None:
    (copied / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert NativeEngine(EngineConfig(model=str(copied), num_kv_blocks=16)).eos_token_ids == {2, 7}
    (copied / "generation_config.json").unlink()
    assert NativeEngine(EngineConfig(model=str(copied), num_kv_blocks=16)).eos_token_ids == {2}


def test_bfloat16_on_the_cpu_serves_without_packing(make_engine, greedy) -> None:
    engine = make_engine("llama", dtype="bfloat16")
    assert not engine.batch_invariant
    assert len(engine.generate([[5, 6, 7]], greedy(5, ignore_eos=True))[0]) == 5


def test_unsupported_is_a_load_error() -> None:
    assert issubclass(UnsupportedModelError, ModelLoadError)
