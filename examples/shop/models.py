"""The shapes of the Shop models, and whole Hugging Face folders written from them.

Owns configuration and files; training lives in train.py.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from shop.tokenizer import FOLDER, MAX_MODEL_TOKENS, TOKENIZER_FILES

MODELS = Path(__file__).parent.parent / "models"
MAX_SHARD = "9MB"

_SHAPES: dict[str, dict[str, int]] = {
    "teacher": {
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 64,
    },
    "student": {
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 5,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
}


def shop_config(which: str) -> LlamaConfig:
    """The configuration of "teacher", "student" or "tiny" (for tests); ValueError for any other name."""
    if which not in _SHAPES:
        raise ValueError(f"unknown Shop model {which!r}; one of {', '.join(_SHAPES)}")
    generation = json.loads((FOLDER / "generation_config.json").read_text(encoding="utf-8"))
    vocab = json.loads((FOLDER / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    return LlamaConfig(
        **_SHAPES[which],
        vocab_size=len(vocab),
        max_position_embeddings=MAX_MODEL_TOKENS,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=generation["eos_token_id"],
        pad_token_id=generation["pad_token_id"],
        attn_implementation="sdpa",
    )


def build_model(which: str, seed: int) -> LlamaForCausalLM:
    """A fresh fp32 model; the same seed gives the same weights on one version of torch."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(shop_config(which))


def num_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def save_model(model: LlamaForCausalLM, path: Path) -> Path:
    """Write `model` in bf16 as safetensors with the tokenizer beside it; `model` itself is left as it is."""
    path.mkdir(parents=True, exist_ok=True)
    copy = LlamaForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.save_pretrained(path, max_shard_size=MAX_SHARD)
    for name in TOKENIZER_FILES:
        shutil.copy(FOLDER / name, path / name)
    return path


def random_model(path: Path, which: str, seed: int = 0) -> Path:
    return save_model(build_model(which, seed), path)
