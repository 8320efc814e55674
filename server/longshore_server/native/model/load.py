"""Builds a model from a local folder: transformers' own class, safetensors weights or seeded random ones.

It never unpickles, never runs code that comes with a model, and never reaches for the network.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("USE_HUB_KERNELS", "NO")  # read by transformers at import: no kernel from a hub

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from longshore_server.native.attention import interface
from longshore_server.native.config import EngineConfig
from longshore_server.native.errors import ModelLoadError, NativeEngineError, UnsupportedModelError
from longshore_server.native.gemm.plans import Product
from longshore_server.native.model.build import (
    OnFirstLayer,
    build_from_files,
    build_random,
    planned_products,
)
from longshore_server.native.model.placement import build_share
from longshore_server.native.model.vision import VisionTower, is_seeing, language_model
from longshore_server.native.ranks.links import RankLinks

PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
KNOWN_LAYER_TYPES = {"full_attention", "sliding_attention"}
# These RoPE variants pick their frequencies from the longest position in a batch, so rows would depend on
# their neighbours once the original length is exceeded.
BATCH_DEPENDENT_ROPE_TYPES = {"dynamic", "longrope"}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A language model in evaluation mode, and what the engine needs to know of it; `tower` where it sees."""

    model: PreTrainedModel
    num_layers: int
    vocab_size: int
    max_model_len: int
    eos_token_ids: frozenset[int]
    tower: VisionTower | None = None


def read_model_config(config: EngineConfig) -> tuple[dict[str, Any], PreTrainedConfig, int]:
    """config.json as it is and as transformers reads it, and the longest sequence; raises as load_model()."""
    folder = Path(config.model)
    raw = _read_config(folder)
    if config.load_format == "auto":
        _check_weight_files(folder)
        if not (folder / "tokenizer.json").is_file():
            raise ModelLoadError(f"{folder} has no tokenizer.json")
    interface.register()
    try:
        hf_config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, OSError, TypeError) as error:
        raise ModelLoadError(f"{folder}/config.json is not usable: {_one_line(error)}") from error
    text_config = hf_config.get_text_config()
    max_model_len = _max_model_len(text_config, config)
    _check_supported(text_config, raw, max_model_len)
    return raw, hf_config, max_model_len


def load_model(
    config: EngineConfig, links: RankLinks | None = None, on_first_layer: OnFirstLayer | None = None
) -> LoadedModel:
    """Loads the folder that `config` names; raises ModelLoadError or UnsupportedModelError with one line.

    With `links` it loads one rank's share, and all ranks load at the same time. `on_first_layer` is for
    a whole model: it is called if layers are fused, when there is one.
    """
    folder = Path(config.model)
    raw, hf_config, max_model_len = read_model_config(config)
    dtype = _dtype(hf_config, config)
    if links is None:
        model = _build(folder, hf_config, dtype, config, on_first_layer)
    else:
        model = _build_share(folder, hf_config, dtype, config, links)
    for each in (model, language_model(model)):
        each.train(False).requires_grad_(False)
    text_config = hf_config.get_text_config()
    return LoadedModel(
        model=language_model(model),
        num_layers=text_config.num_hidden_layers,
        vocab_size=text_config.vocab_size,
        max_model_len=max_model_len,
        eos_token_ids=_eos_token_ids(folder, raw),
        tower=VisionTower(model) if is_seeing(hf_config) else None,
    )


def products_of(config: EngineConfig) -> list[Product]:
    """The different products of the model's fused layers; raises as load_model() for what is no model."""
    _, hf_config, _ = read_model_config(config)
    return planned_products(hf_config, _dtype(hf_config, config), config)


# --- the folder ---


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ModelLoadError(f"{folder} is not a folder")
    raw = _read_json(folder / "config.json", required=True)
    if "auto_map" in raw:
        raise ModelLoadError(f"{folder} comes with code of its own (auto_map), which is never run")
    return raw


def _read_json(path: Path, *, required: bool = False) -> dict[str, Any]:
    if not path.is_file():
        if required:
            raise ModelLoadError(f"{path.parent} has no {path.name}")
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, OSError) as error:
        raise ModelLoadError(f"{path} cannot be read: {_one_line(error)}") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} is not a JSON object")
    return value


def _check_weight_files(folder: Path) -> None:
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(path.name for pattern in PICKLE_PATTERNS for path in folder.glob(pattern))
    if pickles:
        raise ModelLoadError(f"{folder} has pickled weights only ({pickles[0]}); only safetensors are loaded")
    raise ModelLoadError(f"{folder} has no .safetensors weights")


def _eos_token_ids(folder: Path, raw: dict[str, Any]) -> frozenset[int]:
    """The ending tokens that generation_config.json names, else config.json's."""
    generation = _read_json(folder / "generation_config.json")
    own = raw.get("eos_token_id", (raw.get("text_config") or {}).get("eos_token_id"))
    value = generation.get("eos_token_id", own)
    values = value if isinstance(value, list) else [value]
    return frozenset(token for token in values if isinstance(token, int))


# --- what the config asks for ---


def _max_model_len(hf_config: PreTrainedConfig, config: EngineConfig) -> int:
    limit = getattr(hf_config, "max_position_embeddings", None)
    if not isinstance(limit, int):
        raise UnsupportedModelError(f"{hf_config.model_type} has no max_position_embeddings")
    if config.max_model_len is not None and config.max_model_len > limit:
        raise ModelLoadError(f"max_model_len {config.max_model_len} is above the model's own {limit}")
    return config.max_model_len or limit


def _check_supported(hf_config: PreTrainedConfig, raw: dict[str, Any], max_model_len: int) -> None:
    name = hf_config.model_type
    if getattr(hf_config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder-decoder model")
    if "quantization_config" in raw:
        raise UnsupportedModelError(f"{name} weights are quantized in a way that is not loaded here")
    unknown = set(getattr(hf_config, "layer_types", None) or ()) - KNOWN_LAYER_TYPES
    if unknown:
        raise UnsupportedModelError(f"{name} has layers of type {', '.join(sorted(unknown))}")
    if getattr(hf_config, "attn_logit_softcapping", None) is not None:
        raise UnsupportedModelError(f"{name} needs attention softcapping")
    rope = getattr(hf_config, "rope_parameters", None) or {}
    rope_type = rope.get("rope_type") if isinstance(rope, dict) else None
    original = rope.get("original_max_position_embeddings", 0) if isinstance(rope, dict) else 0
    if rope_type in BATCH_DEPENDENT_ROPE_TYPES and max_model_len > (original or 0):
        raise UnsupportedModelError(
            f"{name} uses {rope_type} RoPE, which is supported up to max_model_len {original} only"
        )


def _dtype(hf_config: PreTrainedConfig, config: EngineConfig) -> torch.dtype:
    """On a CPU "auto" means float32, the fastest there and exact; elsewhere the checkpoint's own."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)  # type: ignore[no-any-return]
    if config.device == "cpu":
        return torch.float32
    if config.quantization == "fp8":
        return torch.bfloat16  # what the products of FP8 come out in
    return getattr(hf_config, "dtype", None) or torch.bfloat16


# --- weights ---


def _build(
    folder: Path,
    hf_config: PreTrainedConfig,
    dtype: torch.dtype,
    config: EngineConfig,
    on_first_layer: OnFirstLayer | None,
) -> PreTrainedModel:
    def build() -> PreTrainedModel:
        if config.load_format == "random":
            return build_random(hf_config, dtype, config, on_first_layer)
        return build_from_files(folder, hf_config, dtype, config, on_first_layer)

    model: PreTrainedModel = _checked(folder, build)
    return model


def _build_share(
    folder: Path, hf_config: PreTrainedConfig, dtype: torch.dtype, config: EngineConfig, links: RankLinks
) -> PreTrainedModel:
    model: PreTrainedModel = _checked(folder, lambda: build_share(folder, hf_config, dtype, config, links))
    return model


def _checked(folder: Path, build: Any) -> Any:
    try:
        return build()
    except NativeEngineError:
        raise
    except torch.OutOfMemoryError as error:
        raise ModelLoadError(f"{folder} does not fit the device's memory: {_one_line(error)}") from error
    except Exception as error:  # transformers and safetensors raise many types for a damaged folder
        raise ModelLoadError(f"{folder} cannot be loaded: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
