"""Builds the ONNX graph of a SmolVLM's picture encoder: SigLIP-like tower, pixel shuffle, projection.

    inputs   pixel_values [1, 3, height, width] float32, from -1 to 1; whole patches
    outputs  image_features [tokens, hidden] float32, one row for each image token of the prompt

The patches go through the shuffle as a square, whatever the picture's shape, as transformers does it; where
their number is no square number, the graph refuses to run. Owns the graph; reads no file.
"""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from longshore_export.graph_parts import CONTRIB_DOMAIN, GraphParts, Rounding, Weights, round_plainly
from longshore_export.quantize_recipe import FP32, Recipe
from longshore_export.vision.shape import VisionShape

TOWER = "model.vision_model"
PROJECTION = "model.connector.modality_projection.proj"


def build_encoder(
    shape: VisionShape,
    weights: Weights,
    places: NDArray[np.int64],
    recipe: Recipe = FP32,
    rounding: Rounding = round_plainly,
) -> onnx.ModelProto:
    """The whole encoder; `weights` by Hugging Face names, [out, in].

    `places` [sides, longest side] is the position of each patch along a side, by the side's length in
    patches. Parts are `vision.layerN.qkv|out|fc1|fc2` and `vision.projection`. Raises UnsupportedModelError
    where the weights are not those of the shape.
    """
    builder = _Encoder(shape, weights, recipe, rounding)
    rows = builder.encoder(places)
    builder.node("Identity", [rows], ["image_features"])
    return builder.to_model(
        "encoder",
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, [1, 3, "height", "width"])],
        [helper.make_tensor_value_info("image_features", TensorProto.FLOAT, ["tokens", shape.hidden_size])],
    )


class _Encoder(GraphParts):
    def __init__(self, shape: VisionShape, weights: Weights, recipe: Recipe, rounding: Rounding) -> None:
        super().__init__(weights, recipe, rounding)
        self._shape = shape

    def encoder(self, places: NDArray[np.int64]) -> str:
        residual = self.embedding(places)
        normed = self.norm(residual, "layer0.normed", self._layer(0, "layer_norm1"))
        for index in range(self._shape.num_layers):
            mixed = self.attention(index, normed)
            attended = self.linear(
                mixed, f"vision.layer{index}.out", [self._layer(index, "self_attn.out_proj")]
            )
            normed, residual = self.add_and_norm(
                attended, residual, f"layer{index}.mlp_in", self._layer(index, "layer_norm2")
            )
            fed = self.feed_forward(index, normed)
            is_last = index + 1 == self._shape.num_layers
            following = f"{TOWER}.post_layernorm" if is_last else self._layer(index + 1, "layer_norm1")
            normed, residual = self.add_and_norm(fed, residual, f"layer{index}.left", following)
        return self.linear(self.shuffled(normed), "vision.projection", [PROJECTION])

    def _layer(self, index: int, name: str) -> str:
        return f"{TOWER}.encoder.layers.{index}.{name}"

    def numbers(self, name: str, *values: int) -> str:
        return self.constant(name, np.array(values, np.int64))

    # --- patches and their places ---

    def embedding(self, places: NDArray[np.int64]) -> str:
        """[1, patches, width]: every patch, plus the embedding of its place."""
        shape, name = self._shape, f"{TOWER}.embeddings"
        kernel = self.constant("patch.weight", self.weight(f"{name}.patch_embedding.weight"))
        bias = self.constant("patch.bias", self.weight(f"{name}.patch_embedding.bias"))
        side = [shape.patch_px, shape.patch_px]
        grid = self.node(
            "Conv", ["pixel_values", kernel, bias], ["patches.grid"], kernel_shape=side, strides=side
        )
        flat = self.node(
            "Reshape", [grid, self.numbers("patches_flat", 1, shape.width, -1)], ["patches.flat"]
        )
        patches = self.node("Transpose", [flat], ["patches"], perm=[0, 2, 1])
        embedded = self.node(
            "Gather", [self.positions(), self.place_ids(grid, places)], ["positions"], axis=0
        )
        return self.node("Add", [patches, embedded], ["embedded"])

    def positions(self) -> str:
        weight = self.weight(f"{TOWER}.embeddings.position_embedding.weight")
        return self.constant("position_embedding", weight)

    def place_ids(self, grid: str, places: NDArray[np.int64]) -> str:
        """[patches] ids: row times the table's side, plus column."""
        self.constant("places", places)
        rows, columns = (self.along_side(grid, axis, name) for axis, name in ((2, "row"), (3, "column")))
        per_side = self.numbers("positions_per_side", self._shape.positions_per_side)
        begin = self.node("Mul", [rows, per_side], ["row.begins"])
        down = self.node("Unsqueeze", [begin, self.numbers("one", 1)], ["row.down"])
        table = self.node("Add", [down, columns], ["place.table"])
        return self.node("Reshape", [table, self.numbers("any_length", -1)], ["place.ids"])

    def along_side(self, grid: str, axis: int, name: str) -> str:
        """Places along one side, [patches of the side], looked up by its length."""
        length = self.node("Shape", [grid], [f"{name}.length"], start=axis, end=axis + 1)
        found = self.node("Gather", ["places", length], [f"{name}.found"], axis=0)  # [1, longest]
        zero, one = self.numbers("zero", 0), self.numbers("one", 1)
        cut = self.node("Slice", [found, zero, length, one], [f"{name}.cut"])
        return self.node("Squeeze", [cut, zero], [f"{name}.places"])

    # --- layers ---

    def norm(self, source: str, out: str, name: str) -> str:
        gamma, beta = self._norm_weights(name)
        epsilon = self._shape.layer_norm_eps
        return self.node("LayerNormalization", [source, gamma, beta], [out], axis=-1, epsilon=epsilon)

    def add_and_norm(self, source: str, skip: str, out: str, name: str) -> tuple[str, str]:
        """(norm of the sum, the sum), in one kernel."""
        self.node(
            "SkipLayerNormalization",
            [source, skip, *self._norm_weights(name)],
            [out, "", "", f"{out}.sum"],
            domain=CONTRIB_DOMAIN,
            epsilon=self._shape.layer_norm_eps,
        )
        return out, f"{out}.sum"

    def _norm_weights(self, name: str) -> tuple[str, str]:
        return (
            self.constant(f"{name}.weight", self.weight(f"{name}.weight")),
            self.constant(f"{name}.bias", self.weight(f"{name}.bias")),
        )

    def attention(self, index: int, source: str) -> str:
        """Every patch attends to every patch."""
        prefix = f"vision.layer{index}"
        names = [self._layer(index, f"self_attn.{part}_proj") for part in "qkv"]
        fused = self.linear(source, f"{prefix}.qkv", names)
        parts = [f"{prefix}.{part}" for part in "qkv"]
        self.node("Split", [fused], parts, axis=-1, num_outputs=3)
        return self.node(
            "MultiHeadAttention",
            parts,
            [f"{prefix}.mixed"],
            domain=CONTRIB_DOMAIN,
            num_heads=self._shape.num_heads,
        )

    def feed_forward(self, index: int, source: str) -> str:
        prefix = f"vision.layer{index}"
        wide = self.linear(source, f"{prefix}.fc1", [self._layer(index, "mlp.fc1")])
        bent = self.node("FastGelu", [wide], [f"{prefix}.bent"], domain=CONTRIB_DOMAIN)
        return self.linear(bent, f"{prefix}.fc2", [self._layer(index, "mlp.fc2")])

    # --- to the decoder ---

    def shuffled(self, source: str) -> str:
        """[tokens, width * s * s]: each token is an s x s square of patches side by side."""
        shape, step = self._shape, self._shape.scale_factor
        count = self.node("Shape", [source], ["num_patches"], start=1, end=2)
        as_float = self.node("Cast", [count], ["num_patches.float"], to=TensorProto.FLOAT)
        root = self.node("Sqrt", [as_float], ["side.float"])
        side = self.node("Cast", [root], ["side"], to=TensorProto.INT64)
        steps = self.numbers("scale_factor", step)
        blocks = self.node("Div", [side, steps], ["side.blocks"])
        width = self.numbers("width", shape.width)
        dims = self.node("Concat", [blocks, steps, blocks, steps, width], ["square.shape"], axis=0)
        square = self.node("Reshape", [source, dims], ["square"])
        turned = self.node("Transpose", [square], ["square.turned"], perm=[0, 2, 1, 3, 4])
        rows = self.numbers("shuffled_shape", -1, shape.width * step * step)
        return self.node("Reshape", [turned, rows], ["shuffled"])
