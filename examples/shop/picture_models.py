"""The shape of the picture model, its tokenizer, and whole Hugging Face folders written from them.

A SmolVLM (transformers' own class): a vision tower, a pixel shuffle, and a Llama that reads. Owns
configuration and files; training lives in train_pictures.py.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

from shop.chat import IMAGE
from shop.models import MODELS
from shop.tokenizer import FOLDER, MAX_MODEL_TOKENS

SIZES_PX: tuple[int, ...] = (64, 96, 128, 160, 192, 224, 256, 320)
"""Widths of the square buckets. transformers' connector takes the patches for a square, so they are one."""
PATCH_PX, SCALE_FACTOR = 8, 2
UNIT_PX = PATCH_PX * SCALE_FACTOR
POSITIONS_PER_SIDE = 41
"""A prime above the longest side in patches: no patch then lies on the border of two positions, where fp32
rounding would decide, on one machine so and on another so; and no two patches of a side share one."""
IMAGE_VALUE = 0.5  # mean and deviation: a byte becomes byte / 127.5 - 1
VISION_MODEL = MODELS / "shop-vision"

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('unknown role: ' ~ message['role']) -}}"
    "{%- endif -%}"
    "{{- '<|' ~ message['role'] ~ '|>' -}}"
    "{%- if message['content'] is string -%}"
    "{{- message['content'] -}}"
    "{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{{- part['text'] if part['type'] == 'text' else '" + IMAGE + "' -}}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{{- '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


@dataclass(frozen=True, slots=True)
class VisionSizes:
    """Widths and depths of tower and reader."""

    vision_width: int
    vision_layers: int
    vision_heads: int
    vision_mlp: int
    text_width: int
    text_layers: int
    text_mlp: int
    text_heads: int
    head_dim: int
    sizes_px: tuple[int, ...] = SIZES_PX


_SHAPES = {
    "vision": VisionSizes(192, 5, 3, 576, 192, 3, 384, 6, 32),
    "tiny": VisionSizes(64, 2, 2, 128, 64, 2, 128, 4, 16, SIZES_PX[:3]),
}


def num_image_tokens(width_px: int, height_px: int) -> int:
    return (width_px // UNIT_PX) * (height_px // UNIT_PX)


def sizes_of(which: str) -> VisionSizes:
    """ "vision", the demo model, or "tiny", for tests; ValueError for any other name."""
    if which not in _SHAPES:
        raise ValueError(f"unknown picture model {which!r}; one of {', '.join(_SHAPES)}")
    return _SHAPES[which]


def vision_config(which: str = "vision") -> SmolVLMConfig:
    """The configuration of a picture model; ValueError for an unknown name."""
    sizes = sizes_of(which)
    generation = json.loads((FOLDER / "generation_config.json").read_text(encoding="utf-8"))
    image_token_id = len(
        json.loads((FOLDER / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    )
    text = {
        "model_type": "llama",
        "hidden_size": sizes.text_width,
        "intermediate_size": sizes.text_mlp,
        "num_hidden_layers": sizes.text_layers,
        "num_attention_heads": sizes.text_heads,
        "num_key_value_heads": 2,
        "head_dim": sizes.head_dim,
        "vocab_size": image_token_id + 1,
        "max_position_embeddings": MAX_MODEL_TOKENS,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": generation["eos_token_id"],
        "pad_token_id": generation["pad_token_id"],
    }
    vision = {
        "hidden_size": sizes.vision_width,
        "intermediate_size": sizes.vision_mlp,
        "num_hidden_layers": sizes.vision_layers,
        "num_attention_heads": sizes.vision_heads,
        "patch_size": PATCH_PX,
        "image_size": PATCH_PX * POSITIONS_PER_SIDE,
    }
    return SmolVLMConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=image_token_id,
        scale_factor=SCALE_FACTOR,
        tie_word_embeddings=False,
        pad_token_id=generation["pad_token_id"],
    )


def build_vision_model(seed: int, which: str = "vision") -> SmolVLMForConditionalGeneration:
    """A fresh fp32 model in eval mode; the same seed gives the same weights on one version of torch."""
    torch.manual_seed(seed)
    model = SmolVLMForConditionalGeneration(vision_config(which))
    _spread(model)
    return model.eval()


@torch.no_grad()
def _spread(model: SmolVLMForConditionalGeneration) -> None:
    """Start patches, places and words at one scale, and places as waves, so that near ones are alike.

    From tiny random numbers, the tower has to learn which patches are neighbours before it can read.
    """
    embeddings = model.model.vision_model.embeddings
    patch = embeddings.patch_embedding.weight
    patch.normal_(0.0, patch[0].numel() ** -0.5)
    embeddings.position_embedding.weight.copy_(_waves(patch.shape[0]) * 0.5)
    model.model.text_model.embed_tokens.weight.normal_(0.0, 0.5)


def _waves(width: int) -> torch.Tensor:
    """[positions, width]: sines and cosines of row and column at a quarter of the width each."""
    quarter = width // 4
    lengths = 2.0 ** torch.linspace(0, math.log2(POSITIONS_PER_SIDE), quarter)
    angles = torch.arange(POSITIONS_PER_SIDE)[:, None] / lengths  # [side, quarter]
    side = torch.cat([angles.sin(), angles.cos()], 1)
    rows = side[:, None].expand(-1, POSITIONS_PER_SIDE, -1)
    return torch.cat([rows, rows.transpose(0, 1)], 2).flatten(0, 1)


def save_vision_model(model: SmolVLMForConditionalGeneration, path: Path, which: str = "vision") -> Path:
    """Write `model` in bf16 as safetensors, with tokenizer, template and picture sizes beside it."""
    path.mkdir(parents=True, exist_ok=True)
    copy = SmolVLMForConditionalGeneration(model.config).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.save_pretrained(path)
    _write_tokenizer(path)
    _dump(path / "preprocessor_config.json", preprocessor_config(sizes_of(which).sizes_px))
    return path


def preprocessor_config(sizes_px: tuple[int, ...]) -> dict[str, object]:
    """What turns a picture into pixel values, in the names of transformers, and the buckets beside it."""
    return {
        "image_processor_type": "SmolVLMImageProcessor",
        "buckets": [[size, size, num_image_tokens(size, size)] for size in sizes_px],
        "do_convert_rgb": True,
        "do_image_splitting": False,
        "do_normalize": True,
        "do_pad": False,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [IMAGE_VALUE] * 3,
        "image_std": [IMAGE_VALUE] * 3,
        "resample": 3,  # Pillow's BICUBIC
        "rescale_factor": 1 / 255,
    }


def vision_tokenizer(file: Path) -> Tokenizer:
    """Write the Shop tokenizer with one more token, the picture's, to `file`, and load it."""
    tokenizer = json.loads((FOLDER / "tokenizer.json").read_text(encoding="utf-8"))
    last, image_token_id = tokenizer["added_tokens"][-1], len(tokenizer["model"]["vocab"])
    tokenizer["added_tokens"].append({**last, "id": image_token_id, "content": IMAGE})
    _dump(file, tokenizer)
    return Tokenizer.from_file(str(file))


def _write_tokenizer(path: Path) -> None:
    vision_tokenizer(path / "tokenizer.json")
    config = json.loads((FOLDER / "tokenizer_config.json").read_text(encoding="utf-8"))
    _dump(path / "tokenizer_config.json", {**config, "chat_template": CHAT_TEMPLATE})
    for name in ("chat_prefix_suffix.json", "generation_config.json"):
        shutil.copy(FOLDER / name, path / name)


def _dump(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def random_vision_model(path: Path, which: str = "tiny", seed: int = 0) -> Path:
    return save_vision_model(build_vision_model(seed, which), path, which)
