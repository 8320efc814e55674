"""Tiny random models that see, as Hugging Face folders with Shop's tokenizer, and pictures to show them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer
from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

from shop.tokenizer import FOLDER, TOKENIZER_FILES

IMAGE_TOKEN = "<image>"
PATCH_PX, SCALE = 8, 2
UNIT_PX = PATCH_PX * SCALE
EOS = 1
BUCKETS = [(side, side, (side // UNIT_PX) ** 2) for side in (32, 48, 64)]
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' ~ message['role'] ~ '|>' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{{- '<image>' if part['type'] == 'image' else part['text'] -}}"
    "{%- endfor -%}{%- endif -%}"
    "{{- '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def seeing_config(vocab_size: int, **text: Any) -> SmolVLMConfig:
    """As many layers in the tower as in the decoder, so that taking one for the other shows."""
    sizes = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": vocab_size,
        "max_position_embeddings": 512,
        "eos_token_id": EOS,
        "bos_token_id": None,
        "pad_token_id": 0,
        "initializer_range": 0.2,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": PATCH_PX,
        "initializer_range": 0.2,
    }
    return SmolVLMConfig(
        text_config=sizes | text, vision_config=vision, scale_factor=SCALE, image_token_id=vocab_size - 1
    )


def write_seeing_model(folder: Path, *, seed: int = 5, **text: Any) -> Path:
    """A folder as a trained one looks: weights, tokenizer with the image token, template and buckets."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        shutil.copy(FOLDER / name, folder / name)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": CHAT_TEMPLATE}))
    torch.manual_seed(seed)
    model = SmolVLMForConditionalGeneration(seeing_config(tokenizer.get_vocab_size(), **text))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):  # away from ones and zeros, so that they count
                parameter.uniform_(0.5, 1.5)
        model.lm_head.weight[: EOS + 1] = 0.0  # answers do not end early
    model.generation_config.eos_token_id = EOS
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"buckets": BUCKETS}))
    return folder


def picture_rgb(seed: int, height_px: int, width_px: int) -> np.ndarray:
    """Random pixels: uint8 [height, width, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (height_px, width_px, 3), dtype=np.uint8)


def pixel_values(rgb: np.ndarray) -> torch.Tensor:
    """What transformers' class takes of one picture: float32 [1, 1, 3, height, width]."""
    return (torch.from_numpy(rgb).permute(2, 0, 1).float() / 127.5 - 1)[None, None]
