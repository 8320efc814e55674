"""The shapes of the Shop models, and whole Hugging Face folders written from them.

Owns configuration and files; training lives in train.py.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from shop.tokenizer import FOLDER, MAX_MODEL_TOKENS, TOKENIZER_FILES

MODELS = Path(__file__).parent.parent / "models"
MAX_SHARD = "9MB"
LOOK_BACK = (1, 2, 3, 1, 2, 3)
"""How far back the name stands from what is said of it: 1 to 3 tokens, on the sheet and in an answer."""

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
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=generation["eos_token_id"],
        pad_token_id=generation["pad_token_id"],
        attn_implementation="sdpa",
    )


def build_model(which: str, seed: int) -> LlamaForCausalLM:
    """A fresh fp32 model; the same seed gives the same weights on one version of torch."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(shop_config(which))
    look_back(model)
    return model


@torch.no_grad()
def look_back(model: LlamaForCausalLM, distances: tuple[int, ...] = LOOK_BACK, strength: float = 4.5) -> None:
    """Start the first layer's heads as look-backs: head h attends to the token `distances[h]` before its own.

    A look-up needs a value that knows its item and a query that searches for it, and neither earns anything
    without the other: from plain random weights, on an earlier form of the sheet, both models sat at chance
    for thousands of steps. Every embedding gets one shared direction; queries and keys read a rotary phase
    from it, strongest at the wanted distance. Embeddings start at unit size and values are passed on at 0.7
    of it, so that neither drowns the other as the rest grows. All of it stays trainable.
    """
    config, attention = model.config, model.model.layers[0].self_attn
    embedding = model.model.embed_tokens.weight
    embedding.normal_(0.0, 1.0)
    attention.v_proj.weight.normal_(0.0, config.hidden_size**-0.5)
    attention.o_proj.weight.normal_(0.0, 0.7 * config.head_dim**-0.5)
    shared = F.normalize(torch.randn(config.hidden_size), dim=0)
    embedding += shared * embedding.norm(dim=1).mean()
    gain = strength / math.sqrt(
        config.hidden_size / 2
    )  # half of the normed state's power lies along `shared`
    theta = config.rope_parameters["rope_theta"] ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)
    sharp = (theta > 0.08).float()  # slower pairs cannot tell neighbours apart
    key_phase = torch.cat([sharp, torch.zeros_like(sharp)])
    for start in range(0, config.num_key_value_heads * config.head_dim, config.head_dim):
        attention.k_proj.weight[start : start + config.head_dim] += gain * torch.outer(key_phase, shared)
    for head in range(config.num_attention_heads):
        turn = theta * distances[head % len(distances)]
        query_phase = torch.cat([sharp * turn.cos(), -sharp * turn.sin()])
        start = head * config.head_dim
        attention.q_proj.weight[start : start + config.head_dim] += gain * torch.outer(query_phase, shared)


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
