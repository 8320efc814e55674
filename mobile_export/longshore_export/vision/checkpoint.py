"""Reads the parts of a SmolVLM folder: its decoder as a model by itself, and what its encoder is made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from longshore.errors import ExportError
from longshore_export.vision.shape import VisionShape


@dataclass(frozen=True)
class VisionCheckpoint:
    """The whole model, fp32, in eval mode; `weights` are tower's and connector's by Hugging Face names.

    `places` [sides, longest side] int64: the position of each patch along a side, by the side's length.
    """

    model: Any
    shape: VisionShape
    weights: dict[str, NDArray[np.float32]]
    places: NDArray[np.int64]


def load_whole(folder: Path) -> Any:
    """The SmolVLM in `folder`, fp32; ExportError where it can't be loaded."""
    from transformers import AutoModelForImageTextToText
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model = AutoModelForImageTextToText.from_pretrained(
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


def decoder_of(model: Any) -> Any:
    """The decoder as a causal model of its own kind, over the same weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):  # its own weights are never made
        decoder = AutoModelForCausalLM.from_config(model.config.text_config, attn_implementation="sdpa")
    decoder.model, decoder.lm_head = model.model.text_model, model.lm_head
    return decoder.eval()


def read_vision(model: Any, shape: VisionShape) -> VisionCheckpoint:
    """What the encoder's graph is built from."""
    weights = {
        name: tensor.numpy()
        for name, tensor in model.state_dict().items()
        if name.startswith(("model.vision_model.", "model.connector."))
    }
    return VisionCheckpoint(model, shape, weights, _places(shape))


def _places(shape: VisionShape) -> NDArray[np.int64]:
    """As the tower computes them, in fp32 with its rounding: a patch on a border falls where it falls."""
    longest, per_side = shape.max_patches_per_side, shape.positions_per_side
    borders = torch.arange(1 / per_side, 1.0, 1 / per_side)
    table = torch.zeros(longest + 1, longest, dtype=torch.long)
    for side in range(1, longest + 1):
        begins = torch.arange(side, dtype=torch.float32) * (1.0 / torch.tensor(side))
        table[side, :side] = torch.bucketize(begins.clamp(max=1 - 1e-6), borders, right=True)
    return table.numpy()
