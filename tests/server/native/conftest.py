"""Tiny models of every family the engine is checked on, saved as real folders, and engines over them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("USE_HUB_KERNELS", "NO")

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from longshore_server.native import EngineConfig, NativeEngine, SamplingParams

VOCAB_SIZE = 300
EOS = 2
BASE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 256,
    "eos_token_id": EOS,
    "bos_token_id": 1,
    "pad_token_id": 0,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
SPECIFIC: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"]},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 24},
    "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": 24},
    "qwen3-mixed": {  # one layer sees everything, the others a window
        "architectures": ["Qwen3ForCausalLM"],
        "head_dim": 24,
        "use_sliding_window": True,
        "sliding_window": 12,
        "max_window_layers": 1,
    },
}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from a family's name to a folder with config, safetensors and a tokenizer file."""
    root = tmp_path_factory.mktemp("models")

    def folder_of(family: str) -> Path:
        folder = root / family
        if not folder.exists():
            folder.mkdir()
            (folder / "config.json").write_text(
                json.dumps({"model_type": family.partition("-")[0], **BASE, **SPECIFIC[family]})
            )
            torch.manual_seed(7)
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
            for name, parameter in model.named_parameters():
                if "norm" in name or "bias" in name:  # away from ones and zeros, so that they are tested too
                    torch.nn.init.uniform_(parameter, 0.5, 1.5)
            model.save_pretrained(folder)
            (folder / "tokenizer.json").write_text("{}")
        return folder

    return folder_of


@pytest.fixture(scope="session")
def oracle(model_folder: Callable[[str], Path]) -> Callable[[str], PreTrainedModel]:
    """The family's model as transformers runs it by itself, with eager attention."""
    cache: dict[str, PreTrainedModel] = {}

    def of(family: str) -> PreTrainedModel:
        if family not in cache:
            cache[family] = AutoModelForCausalLM.from_pretrained(
                model_folder(family), attn_implementation="eager", dtype=torch.float32
            ).eval()
        return cache[family]

    return of


@pytest.fixture(scope="session")
def make_engine(model_folder: Callable[[str], Path]) -> Callable[..., NativeEngine]:
    def make(
        family: str = "llama", *, clock: Callable[[], float] | None = None, **settings: Any
    ) -> NativeEngine:
        config = EngineConfig(
            **{
                "model": str(model_folder(family)),
                "max_num_seqs": 8,
                "num_kv_blocks": 256,
                "block_size": 4,
                **settings,
            }
        )
        return NativeEngine(config, **({"clock": clock} if clock else {}))

    return make


@pytest.fixture(scope="session")
def greedy() -> Callable[..., SamplingParams]:
    return lambda max_tokens=24, **settings: SamplingParams(
        max_tokens=max_tokens, temperature=0.0, **settings
    )
