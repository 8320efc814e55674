"""Built-in model shapes for random weights, and what a model of a given shape costs to run.

Writes a config.json into a folder of the caller's; downloads nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from longshore_server.native.config import EngineConfig

_LLAMA3: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "num_key_value_heads": 8,
    "head_dim": 128,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "tie_word_embeddings": False,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
# Shapes of the published Llama 3.1 models.
BUILT_IN: dict[str, dict[str, Any]] = {
    "llama-8b": _LLAMA3
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "llama-70b": _LLAMA3
    | {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
}


def write_config(name: str, folder: Path) -> Path:
    """Writes the built-in `name` to `folder`/config.json and returns the folder."""
    (folder / "config.json").write_text(json.dumps(BUILT_IN[name], indent=2))
    return folder


@dataclass(frozen=True, slots=True)
class ModelCost:
    """What one step reads and computes, counted from the model's shape.

    `layer_params` are the weights of the layers, which FP8 makes one byte each; `other_params` (the head)
    keep the model's dtype. Embedding rows are looked up, not read whole, and do not count.
    """

    layer_params: int
    other_params: int
    kv_elements: int  # of one token, over all layers
    attention_width: int  # query heads * head size, over all layers
    layer_bytes: float
    other_bytes: float
    kv_bytes: float

    @property
    def weight_bytes(self) -> float:
        """Bytes of weights that every step reads."""
        return self.layer_params * self.layer_bytes + self.other_params * self.other_bytes

    def decode_bytes(self, num_steps: float, num_context_tokens: float) -> float:
        """Bytes that `num_steps` read when their rows attend `num_context_tokens` in all."""
        return num_steps * self.weight_bytes + num_context_tokens * self.kv_elements * self.kv_bytes

    def flops(self, num_tokens: float, num_sampled: float, num_context_tokens: float) -> float:
        """Multiply-adds times two, for computed tokens, sampled rows and attended (row, token) pairs."""
        linear = 2 * (num_tokens * self.layer_params + num_sampled * self.other_params)
        return linear + 4 * num_context_tokens * self.attention_width


def dtype_of(config: EngineConfig) -> torch.dtype:
    """The type that the engine computes in, by the engine's own rule."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)  # type: ignore[no-any-return]
    if config.device == "cpu":
        return torch.float32
    return getattr(AutoConfig.from_pretrained(config.model), "dtype", None) or torch.bfloat16


def model_cost(
    folder: str, dtype: torch.dtype, *, quantization: str, kv_cache_dtype: str
) -> ModelCost | None:
    """Counts a folder's model; None for mixtures of experts, whose steps read only some of their weights."""
    whole = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    config = whole.get_text_config()  # a model that sees answers prompts of text with this alone
    if any("experts" in key for key in config.to_dict()):
        return None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)  # type: ignore[no-untyped-call]
    head = model.get_output_embeddings()
    layers = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    is_fp8 = quantization.startswith("fp8")
    return ModelCost(
        layer_params=layers,
        other_params=head.weight.numel(),
        kv_elements=2 * config.num_hidden_layers * num_kv_heads * head_dim,
        attention_width=config.num_hidden_layers * config.num_attention_heads * head_dim,
        layer_bytes=1 if is_fp8 else dtype.itemsize,
        other_bytes=dtype.itemsize,
        kv_bytes=1 if kv_cache_dtype.startswith("fp8") else dtype.itemsize,
    )
