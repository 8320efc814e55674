"""Reads a Hugging Face folder for export: model in fp32, RoPE tables, tokenizer files, special tokens.

Safetensors only, no remote code, nothing from a network.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from longshore.errors import ExportError
from longshore_export.shape import DecoderShape, read_shape

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Checkpoint:
    """A model folder, loaded; `cos` and `sin` are [positions, head_dim / 2]."""

    folder: Path
    model: Any  # a transformers model, fp32, in eval mode
    shape: DecoderShape
    weights: dict[str, Array]
    cos: Array
    sin: Array
    eos_token_ids: tuple[int, ...]


def load_checkpoint(folder: Path, max_tokens: int | None = None) -> Checkpoint:
    """Raises ExportError for what is missing, UnsupportedModelError for what can't be built."""
    if not (folder / "config.json").is_file():
        raise ExportError(f"there is no model at {folder}: config.json is missing")
    if not list(folder.glob("*.safetensors")):
        raise ExportError(f"there are no safetensors weights in {folder}")
    if not (folder / "tokenizer.json").is_file():
        raise ExportError(f"there is no tokenizer in {folder}: tokenizer.json is missing")
    config = _config(folder)
    shape = read_shape(config, max_tokens)
    model = _model(folder)
    cos, sin = _rotary_tables(model, shape)
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    return Checkpoint(folder, model, shape, weights, cos, sin, _eos_token_ids(folder, config))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty where there is no file; ExportError where it is no object."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ExportError(f"{path.name} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ExportError(f"{path.name} is not a JSON object")
    return value


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ExportError(f"config.json can't be used: {str(error).splitlines()[0]}") from None


def _model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            attn_implementation="sdpa",
        )
    except Exception as error:  # safetensors and transformers raise what they please on a bad file
        raise ExportError(f"the weights can't be loaded: {str(error).splitlines()[0]}") from None
    return model.eval()


@torch.no_grad()
def _rotary_tables(model: Any, shape: DecoderShape) -> tuple[Array, Array]:
    """Cosine and sine of every position, as transformers' own module gives them, scaling included."""
    positions = torch.arange(shape.max_tokens)[None]
    cos, sin = model.model.rotary_emb(
        torch.zeros(1, 1, 1), positions
    )  # [1, positions, head_dim], halves equal
    half = shape.head_dim // 2
    return cos[0, :, :half].numpy(), sin[0, :, :half].numpy()


def _eos_token_ids(folder: Path, config: Any) -> tuple[int, ...]:
    """The ids that end an answer: the generation configuration's, else the model's."""
    found = read_json(folder / "generation_config.json").get("eos_token_id")
    if found is None:
        found = getattr(config, "eos_token_id", None)
    ids = tuple(found) if isinstance(found, list | tuple) else (found,)
    if not ids or not all(isinstance(item, int) and 0 <= item < config.vocab_size for item in ids):
        raise ExportError("the model names no end-of-answer token (eos_token_id)")
    return ids
