"""Makes one variant of the picture encoder: graph, file, parity with torch. Does not choose among them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longshore.errors import ExportError
from longshore_export.graph_parts import Rounding, required_operators, round_plainly
from longshore_export.quantize_emulate import round_together
from longshore_export.quantize_recipe import FP32, INT8, Precision, Recipe
from longshore_export.vision.checkpoint import VisionCheckpoint
from longshore_export.vision.graph import build_encoder
from longshore_export.vision.verify import EncoderParity, check_encoder, check_rounded_encoder

ENCODERS = {recipe.name: recipe for recipe in (FP32, INT8)}


@dataclass(frozen=True, slots=True)
class BuiltEncoder:
    """An encoder's graph that was written and compared with torch."""

    name: str
    precision: Precision
    file: Path
    required_operators: tuple[str, ...]
    parity: EncoderParity


def build_encoder_variant(vision: VisionCheckpoint, name: str, file: Path) -> BuiltEncoder:
    """Write encoder `name` ("fp32" or "int8") to `file`; ParityError where it computes something else."""
    if name not in ENCODERS:
        raise ExportError(f"there is no encoder {name!r}; there are {', '.join(ENCODERS)}")
    recipe = ENCODERS[name]
    model = build_encoder(vision.shape, vision.weights, vision.places, recipe)
    file.write_bytes(model.SerializeToString(deterministic=True))
    if recipe is FP32:
        parity = check_encoder(file, vision)
    else:
        parity = check_rounded_encoder(file, vision, emulate_encoder(vision.model, recipe))
    return BuiltEncoder(name, recipe.precision, file, required_operators(model), parity)


def emulate_encoder(model: Any, recipe: Recipe, rounding: Rounding = round_plainly) -> Any:
    """A copy of the model whose tower and connector round weights and activations as the graph does."""
    rounded = copy.deepcopy(model)
    for index, layer in enumerate(rounded.model.vision_model.encoder.layers):
        for part, parent, names in (
            ("qkv", layer.self_attn, ("q_proj", "k_proj", "v_proj")),
            ("out", layer.self_attn, ("out_proj",)),
            ("fc1", layer.mlp, ("fc1",)),
            ("fc2", layer.mlp, ("fc2",)),
        ):
            name = f"vision.layer{index}.{part}"
            round_together(parent, names, recipe.format_of(name), rounding, name)
    projection = rounded.model.connector.modality_projection
    round_together(
        projection, ("proj",), recipe.format_of("vision.projection"), rounding, "vision.projection"
    )
    return rounded.eval()
