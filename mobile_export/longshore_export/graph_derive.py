"""Nodes that make int8 rows from block codes; constant, so the runtime computes them once, when it loads.

They let a graph for prompts share the bytes of the graph for decoding. Computes nothing here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import TensorProto

from longshore_export.quantize import ROW_LIMIT, BlockWeights

if TYPE_CHECKING:
    from longshore_export.graph_parts import GraphParts

LEAST_SHARED_BYTES = 1024
_SMALLEST_SCALE = np.array(1e-30, np.float32)  # of a row of zeros


def derive_rows(builder: GraphParts, part: str, weights: BlockWeights) -> tuple[str, str, str]:
    """(codes [in, out], scales [out], zero points [out]) of `weights` rounded again, row by row."""
    node, constant = builder.node, builder.constant
    num_rows, num_blocks, size = weights.codes.shape
    codes, scales = builder.block_constants(part, weights)
    steps = _steps(builder, part, codes, weights)
    by_block = constant(f"{part}.by_block", np.array([num_rows, num_blocks, 1], np.int64))
    column = node("Reshape", [scales, by_block], [f"{part}.block_scales"])
    whole = node("Mul", [steps, column], [f"{part}.blocks"])
    flat = constant(f"{part}.flat", np.array([num_rows, num_blocks * size], np.int64))
    matrix = node("Reshape", [whole, flat], [f"{part}.padded"])
    if num_blocks * size != weights.num_inputs:
        ends = [
            constant(f"{part}.{key}", np.array([value], np.int64))
            for key, value in (("begin", 0), ("end", weights.num_inputs), ("axis", 1))
        ]
        matrix = node("Slice", [matrix, *ends], [f"{part}.matrix"])
    largest = node(
        "ReduceMax",
        [node("Abs", [matrix], [f"{part}.sizes"]), _axis(builder, 1)],
        [f"{part}.largest"],
        keepdims=1,
    )
    raw = node(
        "Div", [largest, constant("row_limit", np.array(ROW_LIMIT, np.float32))], [f"{part}.raw_scales"]
    )
    row_scales = node("Max", [raw, constant("smallest_scale", _SMALLEST_SCALE)], [f"{part}.row_scales"])
    rounded = node("Round", [node("Div", [matrix, row_scales], [f"{part}.exact"])], [f"{part}.rounded"])
    as_int8 = node("Cast", [rounded], [f"{part}.int8"], to=TensorProto.INT8)
    return (
        node("Transpose", [as_int8], [f"{part}.int8_in_out"], perm=[1, 0]),
        node(
            "Reshape", [row_scales, constant("any_length", np.array([-1], np.int64))], [f"{part}.scales_out"]
        ),
        constant(f"{part}.zero_points", np.zeros(num_rows, np.int8)),
    )


def _steps(builder: GraphParts, part: str, codes: str, weights: BlockWeights) -> str:
    """Signed steps [out, blocks, block_size] in float, from packed codes."""
    node, constant = builder.node, builder.constant
    if weights.format.bits == 4:
        low = node("BitwiseAnd", [codes, constant("low_bits", np.array(15, np.uint8))], [f"{part}.low"])
        four = constant("four_bits", np.array(4, np.uint8))
        high = node("BitShift", [codes, four], [f"{part}.high"], direction="RIGHT")
        halves = [node("Unsqueeze", [half, _axis(builder, 3)], [f"{half}.apart"]) for half in (low, high)]
        pairs = node("Concat", halves, [f"{part}.pairs"], axis=3)
        shape = constant(f"{part}.shape", np.array(weights.codes.shape, np.int64))
        codes = node("Reshape", [pairs, shape], [f"{part}.bytes"])
    floats = node("Cast", [codes], [f"{part}.floats"], to=TensorProto.FLOAT)
    zero = constant(f"zero_point_{weights.format.bits}", np.array(weights.format.zero_point, np.float32))
    return node("Sub", [floats, zero], [f"{part}.steps"])


def _axis(builder: GraphParts, axis: int) -> str:
    return builder.constant(f"axis_{axis}", np.array([axis], np.int64))


def share_constants(model: onnx.ModelProto, other_file: str, other_bytes: bytes) -> None:
    """Have the constants of `model` that stand in the bytes of `other_file`, too, be read from there."""
    for constant in model.graph.initializer:
        size = len(constant.raw_data)
        begin = other_bytes.find(constant.raw_data) if size >= LEAST_SHARED_BYTES else -1
        if begin < 0:
            continue
        for key, value in {"location": other_file, "offset": begin, "length": size}.items():
            constant.external_data.add(key=key, value=str(value))
        constant.data_location = TensorProto.EXTERNAL
        constant.ClearField("raw_data")
