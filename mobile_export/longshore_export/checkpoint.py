"""Reads a Hugging Face folder for export: model in fp32, RoPE tables, tokenizer files, special tokens.

Safetensors only, no remote code, nothing from a network.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from longshore.errors import ExportError, UnsupportedModelError
from longshore_export.shape import DecoderShape, read_shape
from longshore_export.traced import TracedShape, read_traced_shape
from longshore_export.vision.checkpoint import VisionCheckpoint, decoder_of, load_whole, read_vision
from longshore_export.vision.shape import FAMILY, PROCESSOR_NAME, read_vision_shape

Array = NDArray[np.float32]
Graph = Literal["built", "traced"]
TRACED_ATTENTION = "eager"  # spelt out operator by operator, soft caps and sinks included


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
    vision: VisionCheckpoint | None = None  # of a model that sees; `model` is its decoder then


@dataclass(frozen=True)
class TracedCheckpoint:
    """A model folder, loaded, of which the graph will be traced."""

    folder: Path
    model: Any  # a transformers model, fp32, in eval mode
    shape: TracedShape
    eos_token_ids: tuple[int, ...]
    vision: None = None


AnyCheckpoint = Checkpoint | TracedCheckpoint


def image_token_id(checkpoint: AnyCheckpoint) -> int | None:
    """The token that a picture's features take the place of, of a model that sees."""
    return checkpoint.vision.shape.image_token_id if checkpoint.vision else None


def open_checkpoint(folder: Path, max_tokens: int | None = None, graph: Graph | None = None) -> AnyCheckpoint:
    """For the graph builder where it knows the model, else for tracing, unless `graph` says which.

    Raises ExportError for what is missing, UnsupportedModelError for what can be neither built nor traced.
    """
    if graph == "traced":
        return load_traced(folder, max_tokens)
    try:
        return load_checkpoint(folder, max_tokens)
    except UnsupportedModelError as error:
        if graph == "built":
            raise
        not_built = error.message
    try:
        return load_traced(folder, max_tokens)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{error.message} ({not_built})") from None


def load_traced(folder: Path, max_tokens: int | None = None) -> TracedCheckpoint:
    """As `load_checkpoint`, for a model whose graph will be traced."""
    _check_files(folder)
    config = _config(folder)
    model = _model(folder, TRACED_ATTENTION)
    # the default groups tokens by expert, which ONNX has no operator for
    model.set_experts_implementation("batched_mm")
    return TracedCheckpoint(
        folder, model, read_traced_shape(model, max_tokens), _eos_token_ids(folder, config)
    )


def load_checkpoint(folder: Path, max_tokens: int | None = None) -> Checkpoint:
    """Raises ExportError for what is missing, UnsupportedModelError for what can't be built."""
    _check_files(folder)
    config = _config(folder)
    if config.model_type == FAMILY:
        return _load_seeing(folder, config, max_tokens)
    shape = read_shape(config, max_tokens)
    return _checkpoint(folder, _model(folder, "sdpa"), shape, config)


def _load_seeing(folder: Path, config: Any, max_tokens: int | None) -> Checkpoint:
    """The decoder as a checkpoint like any other, and what sees beside it."""
    vision_shape = read_vision_shape(config, read_json(folder / PROCESSOR_NAME))
    text = config.text_config
    text.tie_word_embeddings = config.tie_word_embeddings  # of the two, the model goes by the outer one
    try:
        shape = read_shape(text, max_tokens)
    except UnsupportedModelError as error:  # the traced route takes no model that sees
        raise ExportError(f"the decoder beside the pictures: {error.message}") from None
    whole = load_whole(folder)
    return _checkpoint(folder, decoder_of(whole), shape, text, read_vision(whole, vision_shape))


def _checkpoint(
    folder: Path, model: Any, shape: DecoderShape, config: Any, vision: VisionCheckpoint | None = None
) -> Checkpoint:
    cos, sin = _rotary_tables(model, shape)
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    return Checkpoint(folder, model, shape, weights, cos, sin, _eos_token_ids(folder, config), vision)


def _check_files(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ExportError(f"there is no model at {folder}: config.json is missing")
    if not list(folder.glob("*.safetensors")):
        raise ExportError(f"there are no safetensors weights in {folder}")
    if not (folder / "tokenizer.json").is_file():
        raise ExportError(f"there is no tokenizer in {folder}: tokenizer.json is missing")


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


def _model(folder: Path, attention: str) -> Any:
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
            attn_implementation=attention,
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
