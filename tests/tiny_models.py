"""Random models in Hugging Face folders for export tests, with Shop's tokenizer; nothing is downloaded."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from shop.tokenizer import FOLDER, TOKENIZER_FILES

VOCAB_SIZE = 1024
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": 1,
    "bos_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def config_of(kind: str) -> Any:
    """One configuration for each thing that the graph builder does differently."""
    return {
        "llama": lambda: LlamaConfig(**SIZES),
        "llama-tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
        "llama-biased": lambda: LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
        "llama-rope": lambda: LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE),
        "llama-one-layer": lambda: LlamaConfig(**SIZES | {"num_hidden_layers": 1}),
        "mistral": lambda: MistralConfig(**SIZES, sliding_window=None),
        "qwen2": lambda: Qwen2Config(**SIZES),
        "qwen3": lambda: Qwen3Config(**SIZES, head_dim=32),
    }[kind]()


def write_model(folder: Path, config: Any, seed: int = 0) -> Path:
    """A folder as a user would have it. Norms and biases are drawn too, so that leaving one out shows."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.3)
            elif seed:
                parameter.mul_(4)  # decided answers, instead of near ties
    model.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(FOLDER / name, folder / name)
    return folder
