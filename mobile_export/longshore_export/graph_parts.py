"""Pieces of an ONNX graph: nodes, constants, and products with weights in every number format.

Knows no architecture; graph.py builds decoders of them, vision_graph.py picture encoders.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from longshore.errors import UnsupportedModelError
from longshore_export.graph_derive import derive_rows
from longshore_export.quantize import (
    BlockFormat,
    BlockWeights,
    DerivedFormat,
    RowFormat,
    RowWeights,
    WeightFormat,
    round_blocks,
    round_rows,
)
from longshore_export.quantize_recipe import Recipe

OPSET = 18
CONTRIB_DOMAIN = "com.microsoft"
IR_VERSION = 9
MIN_ONNXRUNTIME = "1.24"
MAX_MODEL_BYTES = 1_900_000_000  # one protobuf file holds less than 2 GiB
INT8_ACTIVATIONS = 4  # MatMulNBits' accuracy_level: activations are rounded to int8, block by block

Array = NDArray[np.float32]
Weights = Mapping[str, Array]
Quantized = BlockWeights | RowWeights
Rounding = Callable[[str, Array, BlockFormat | RowFormat], Quantized]


def round_plainly(part: str, matrix: Array, form: BlockFormat | RowFormat) -> Quantized:
    """Each weight to the nearest step, whatever the part."""
    return round_rows(matrix) if isinstance(form, RowFormat) else round_blocks(matrix, form)


def required_operators(model: onnx.ModelProto) -> tuple[str, ...]:
    """The operators that a runtime needs, as `domain:name`, the standard domain left out."""
    names = {f"{node.domain}:{node.op_type}" if node.domain else node.op_type for node in model.graph.node}
    return tuple(sorted(names))


class GraphParts:
    """Nodes and constants as they come; every method that computes returns the name of its result."""

    def __init__(self, weights: Weights, recipe: Recipe, rounding: Rounding) -> None:
        self._weights = weights
        self._recipe = recipe
        self._rounding = rounding
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}

    def node(
        self, operator: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes: Any
    ) -> str:
        name = f"{operator}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(operator, inputs, outputs, name, domain=domain, **attributes))
        return outputs[0]

    def constant(self, name: str, value: NDArray[Any]) -> str:
        if name not in self._constants:
            self._constants[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def weight(self, name: str) -> Array:
        try:
            return self._weights[name]
        except KeyError:
            raise UnsupportedModelError(f"the model has no weight {name}") from None

    def linear(self, source: str, out: str, names: list[str]) -> str:
        """`source` times one or several weights side by side, [out, in] each, and their biases if any."""
        matrix = np.concatenate([self.weight(f"{name}.weight") for name in names])
        bias = ""
        if f"{names[0]}.bias" in self._weights:
            bias = self.constant(
                f"{out}.bias", np.concatenate([self.weight(f"{name}.bias") for name in names])
            )
        return self.product(source, out, matrix, self._recipe.format_of(out), bias)

    def product(self, source: str, out: str, matrix: Array, form: WeightFormat, bias: str) -> str:
        """`source` [..., in] times `matrix` [out, in] in its format, plus `bias` unless that is ""."""
        if form is None:
            weight = self.constant(f"{out}.weight", matrix.T)
            plain = self.node("MatMul", [source, weight], [f"{out}.product" if bias else out])
            return self.node("Add", [plain, bias], [out]) if bias else plain
        if isinstance(form, DerivedFormat):
            weights = self._rounding(out, matrix, form.source)
            assert isinstance(weights, BlockWeights)
            names = derive_rows(self, out, weights)
            return self._row_node(source, out, names, bias)
        rounded = self._rounding(out, matrix, form)
        if isinstance(rounded, BlockWeights):
            return self.block_product(source, out, rounded, bias)
        return self.row_product(source, out, rounded, bias)

    def block_product(self, source: str, out: str, weights: BlockWeights, bias: str) -> str:
        codes, scales = self.block_constants(out, weights)
        return self.node(
            "MatMulNBits",
            [source, codes, scales, "", "", bias] if bias else [source, codes, scales],
            [out],
            domain=CONTRIB_DOMAIN,
            K=weights.num_inputs,
            N=len(weights.codes),
            bits=weights.format.bits,
            block_size=weights.format.block_size,
            accuracy_level=INT8_ACTIVATIONS,
        )

    def block_constants(self, part: str, weights: BlockWeights) -> tuple[str, str]:
        codes = self.constant(f"{part}.codes", weights.packed())
        return codes, self.constant(f"{part}.scales", weights.scales)

    def row_product(self, source: str, out: str, weights: RowWeights, bias: str) -> str:
        """Activations are rounded to bytes over the whole call, which is as much as MatMulInteger takes."""
        codes = self.constant(f"{out}.codes", weights.codes.T)
        scales = self.constant(f"{out}.scales", weights.scales)
        zero = self.constant(f"{out}.zero_points", np.zeros(len(weights.codes), np.int8))
        return self._row_node(source, out, (codes, scales, zero), bias)

    def _row_node(self, source: str, out: str, weights: tuple[str, str, str], bias: str) -> str:
        inputs = [source, *weights, *([bias] if bias else [])]
        return self.node("DynamicQuantizeMatMul", inputs, [out], domain=CONTRIB_DOMAIN)

    def to_model(
        self, name: str, inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto]
    ) -> onnx.ModelProto:
        """The whole graph; UnsupportedModelError where its weights don't fit into one file."""
        if sum(constant.ByteSize() for constant in self._constants.values()) > MAX_MODEL_BYTES:
            raise UnsupportedModelError("the weights are over 1.9 GB, more than one ONNX file holds")
        graph = helper.make_graph(self._nodes, name, inputs, outputs, list(self._constants.values()))
        # onnx.checker is not asked: it does not know SimplifiedLayerNormalization, which ONNX Runtime keeps
        # in the standard domain. Making a session of the model is the check, and verify.py does so.
        return helper.make_model(
            graph,
            producer_name="longshore",
            ir_version=IR_VERSION,
            opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB_DOMAIN, 1)],
        )
