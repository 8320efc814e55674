"""A bundle that takes pictures: an exported random student and an encoder of a few lines, both real ONNX.

The encoder's row for a square of 16 pixels is its mean colour times a random matrix, so what a picture shows
decides what is answered. Follows the interface that exported picture models have.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from transformers import AutoModelForCausalLM

from longshore.bundle import describe_file, load_bundle, write_manifest
from longshore.wire import MANIFEST_NAME, SIGNATURE_NAME, Manifest, VisionBucket, VisionGeometry

UNIT_PX = 16
IMAGE = "<|image|>"  # a control token of the Shop tokenizer that nothing else uses
SIZES = (32, 64, 96)
_SCALE = 3.0


def image_token_id(folder: Path) -> int:
    tokens = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    return int(next(token["id"] for token in tokens if token["content"] == IMAGE))


def make_vision_bundle(bundle: Path, out: Path, sizes: tuple[int, ...] = SIZES, **changes: Any) -> Manifest:
    """Copy a bundle of a text model to `out` and give it eyes; `changes` replace fields of its geometry."""
    shutil.copytree(bundle, out)
    manifest = load_bundle(out)
    model = onnx.load(str(out / "model.onnx"))
    table = next(item for item in model.graph.initializer if item.name == "embedding")
    hidden_size = table.dims[1]
    vision = VisionGeometry("vision.onnx", image_token_id(out), UNIT_PX, hidden_size)
    _add_features(model, vision)
    onnx.save(model, str(out / "model.onnx"))
    onnx.save(_encoder(hidden_size), str(out / "vision.onnx"))
    files = sorted(path.name for path in out.iterdir() if path.name not in (MANIFEST_NAME, SIGNATURE_NAME))
    seeing = replace(
        manifest,
        files=tuple(describe_file(out, name) for name in files),
        vision=replace(vision, **changes),
        vision_buckets=tuple(VisionBucket(size, size, (size // UNIT_PX) ** 2) for size in sizes),
        capabilities={**manifest.capabilities, "images": True},
    )
    return write_manifest(out, seeing, None)


def _add_features(model: onnx.ModelProto, vision: VisionGeometry) -> None:
    """Have the embedding take the next row of `image_features` where the image token stands."""
    graph = model.graph
    position, gather = next(
        (index, node) for index, node in enumerate(graph.node) if list(node.output) == ["embedded"]
    )
    gather.output[0] = "embedded.text"
    constants = {
        "image.id": np.array(vision.image_token_id, np.int64),
        "image.one": np.array(1, np.int64),
        "image.axis": np.array(1, np.int64),
        "image.last_axis": np.array([-1], np.int64),
        "image.nothing": np.zeros((1, vision.hidden_size), np.float32),
    }
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    nodes = [
        helper.make_node("Equal", ["input_ids", "image.id"], ["image.is"]),
        helper.make_node("Cast", ["image.is"], ["image.count"], to=TensorProto.INT64),
        helper.make_node("CumSum", ["image.count", "image.axis"], ["image.so_far"]),
        # The row of nothing comes first, so a text token takes row 0 and the n-th image token row n.
        helper.make_node("Mul", ["image.so_far", "image.count"], ["image.row"]),
        helper.make_node("Concat", ["image.nothing", "image_features"], ["image.rows"], axis=0),
        helper.make_node("Gather", ["image.rows", "image.row"], ["image.embedded"], axis=0),
        helper.make_node("Unsqueeze", ["image.is", "image.last_axis"], ["image.where"]),
        helper.make_node("Where", ["image.where", "image.embedded", "embedded.text"], ["embedded"]),
    ]
    for offset, node in enumerate(nodes, 1):
        graph.node.insert(position + offset, node)
    shape = ["image_tokens", vision.hidden_size]
    graph.input.append(helper.make_tensor_value_info("image_features", TensorProto.FLOAT, shape))


def _mixing(hidden_size: int) -> NDArray[np.float32]:
    matrix = np.random.default_rng(7).normal(0, _SCALE / hidden_size**0.5, (3, hidden_size))
    return matrix.astype(np.float32)


def _encoder(hidden_size: int) -> onnx.ModelProto:
    nodes = [
        helper.make_node(
            "AveragePool", ["pixel_values"], ["pooled"], kernel_shape=[UNIT_PX] * 2, strides=[UNIT_PX] * 2
        ),
        helper.make_node("Transpose", ["pooled"], ["last"], perm=[0, 2, 3, 1]),
        helper.make_node("Reshape", ["last", "flat"], ["squares"]),
        helper.make_node("MatMul", ["squares", "mixing"], ["image_features"]),
    ]
    constants = {"flat": np.array([-1, 3], np.int64), "mixing": _mixing(hidden_size)}
    pixels = helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, [1, 3, "height", "width"])
    rows = helper.make_tensor_value_info("image_features", TensorProto.FLOAT, ["tokens", hidden_size])
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "encoder", [pixels], [rows], initializers)
    return helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 18)])


@dataclass(frozen=True)
class TorchSight:
    """What torch answers to a prompt with pictures: the oracle."""

    model_dir: Path
    token_id: int

    @cached_property
    def _model(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.model_dir, dtype=torch.float32)

    def greedy(self, prompt: list[int], pixels: list[NDArray[np.float32]], num_tokens: int) -> list[int]:
        """The best tokens after `prompt`, whose image tokens show `pixels`, [3, height, width] each."""
        model = self._model
        ids = torch.tensor([prompt])
        with torch.no_grad():
            embedded = model.get_input_embeddings()(ids)
            if pixels:
                rows = np.concatenate([self._rows(planes, embedded.shape[-1]) for planes in pixels])
                embedded[ids == self.token_id] = torch.from_numpy(rows)
            tokens = model.generate(
                inputs_embeds=embedded,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_tokens,
                do_sample=False,
                eos_token_id=-1,
                pad_token_id=0,
                suppress_tokens=[self.token_id],
            )
        found: list[int] = tokens[0].tolist()
        return found

    def _rows(self, planes: NDArray[np.float32], hidden_size: int) -> NDArray[np.float32]:
        height, width = planes.shape[1] // UNIT_PX, planes.shape[2] // UNIT_PX
        squares = planes.reshape(3, height, UNIT_PX, width, UNIT_PX).mean((2, 4)).reshape(3, -1).T
        rows: NDArray[np.float32] = (squares @ _mixing(hidden_size)).astype(np.float32)
        return rows
