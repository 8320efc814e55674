"""Latent attention (DeepSeek) and routed experts, through the same engine: equal to transformers.generate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from longshore_server.native import EngineConfig, NativeEngine
from longshore_server.native.errors import ConfigError

from .conftest import BASE

LATENT = {
    "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 20,
    "num_key_value_heads": 4, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
ARCHITECTURES = {
    "deepseek_v2": {"architectures": ["DeepseekV2ForCausalLM"], "topk_method": "greedy", **LATENT},
    "deepseek_v3": {"architectures": ["DeepseekV3ForCausalLM"], **LATENT},
    "mixtral": {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4, **EXPERTS},
    "qwen3_moe": {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 8, "head_dim": 16, **EXPERTS},
}
PROMPTS = [[5, 6, 7, 8], list(range(20, 60)), [9]]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("architectures")

    def folder(name: str) -> Path:
        path = root / name
        if not path.exists():
            path.mkdir()
            raw = {"model_type": name, **BASE, **ARCHITECTURES[name]}
            (path / "config.json").write_text(json.dumps(raw))
            (path / "tokenizer.json").write_text("{}")
            torch.manual_seed(7)
            AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path)).save_pretrained(path)
        return path

    return folder


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_batched_greedy_answers_equal_those_of_transformers(name, folder_of, greedy) -> None:
    engine = NativeEngine(_config(folder_of(name)))
    answers = engine.generate(PROMPTS, greedy(12, ignore_eos=True))
    oracle = AutoModelForCausalLM.from_pretrained(folder_of(name), attn_implementation="eager").eval()
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = torch.tensor([prompt])
        expected = oracle.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert answer == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_random_weights_and_fp8_serve(name, folder_of, greedy) -> None:
    for settings in ({"load_format": "random"}, {"quantization": "fp8"}):
        answers = NativeEngine(_config(folder_of(name), **settings)).generate(
            PROMPTS, greedy(5, ignore_eos=True)
        )
        assert [len(answer) for answer in answers] == [5, 5, 5]


def test_routed_experts_are_not_called_batch_invariant(folder_of) -> None:
    """Their products run over as many rows as the router sends, not over packed weights."""
    assert not NativeEngine(_config(folder_of("mixtral"))).batch_invariant
    with pytest.raises(ConfigError, match="batch_invariant"):
        NativeEngine(_config(folder_of("mixtral"), batch_invariant=True))


def _config(folder: Path, **settings) -> EngineConfig:
    return EngineConfig(
        **{
            "model": str(folder),
            "num_kv_blocks": 64,
            "block_size": 4,
            "max_num_seqs": 4,
            "max_num_batched_tokens": 24,
            **settings,
        }
    )
