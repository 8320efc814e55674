"""Number formats of weights, plain rounding to them, and what the rounded weights stand for.

Everything is symmetric: on AVX2, ONNX Runtime's one-row kernel computes zero points wrongly
(microsoft/onnxruntime#29853). Pure numpy; knows no graph and no file.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

# On x86 without VNNI, sums of two products of a byte and an 8-bit weight saturate; with 7 bits they can't.
ROW_LIMIT = 63
_SHRINKS = np.linspace(1.0, 0.7, 13, dtype=np.float32)


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """`bits` per weight and one fp32 scale for each `block_size` inputs of an output."""

    bits: int
    block_size: int

    @property
    def zero_point(self) -> int:
        return 1 << (self.bits - 1)


@dataclass(frozen=True, slots=True)
class RowFormat:
    """int8 with one fp32 scale for each output; activations are rounded to a byte per call."""


@dataclass(frozen=True, slots=True)
class DerivedFormat:
    """int8 rows that the runtime makes from the codes of `source` when it loads the graph."""

    source: BlockFormat


WeightFormat = BlockFormat | RowFormat | DerivedFormat | None  # None is fp32


@dataclass(frozen=True, slots=True)
class BlockWeights:
    """Codes [out, blocks, block_size], one byte each, and scales [out, blocks], of a matrix [out, in]."""

    format: BlockFormat
    codes: Bytes
    scales: Floats
    num_inputs: int

    def packed(self) -> Bytes:
        """[out, blocks, bytes]: as MatMulNBits reads it, 4-bit codes in pairs with the first one low."""
        if self.format.bits == 8:
            return self.codes
        pairs: Bytes = self.codes[..., 0::2] | np.left_shift(self.codes[..., 1::2], 4, dtype=np.uint8)
        return pairs

    def dequantized(self) -> Floats:
        """The matrix [out, in] that the codes stand for."""
        steps = self.codes.astype(np.float32) - np.float32(self.format.zero_point)
        matrix = steps * self.scales[..., None]
        return np.ascontiguousarray(matrix.reshape(len(matrix), -1)[:, : self.num_inputs])


@dataclass(frozen=True, slots=True)
class RowWeights:
    """Codes [out, in] in int8 and scales [out]."""

    codes: NDArray[np.int8]
    scales: Floats

    def dequantized(self) -> Floats:
        """The matrix [out, in] that the codes stand for."""
        return self.codes.astype(np.float32) * self.scales[:, None]


def blocks_of(matrix: Floats, block_size: int) -> Floats:
    """A matrix [out, in] as [out, blocks, block_size], filled up with zeros."""
    rows, columns = matrix.shape
    padded = np.pad(matrix, ((0, 0), (0, -columns % block_size)))
    return padded.reshape(rows, -1, block_size)


def block_scales(blocks: Floats, bits: int) -> Floats:
    """The scale of each block [..., block_size] with the least squared error of those tried.

    The weight of largest size gets the code that has one step more, which is the negative end; then
    smaller scales are tried, which clip it and serve the rest better.
    """
    low = -(1 << (bits - 1))
    places = np.abs(blocks).argmax(axis=-1, keepdims=True)
    full = np.take_along_axis(blocks, places, axis=-1)[..., 0] / np.float32(low)
    best, least = full, np.full(full.shape, np.inf, np.float32)
    for shrink in _SHRINKS if bits < 8 else _SHRINKS[:1]:
        scales = full * shrink
        error = ((round_to(blocks, scales, bits) * scales[..., None] - blocks) ** 2).sum(axis=-1)
        best, least = np.where(error < least, scales, best), np.minimum(error, least)
    return best.astype(np.float32)


def round_to(blocks: Floats, scales: Floats, bits: int) -> Floats:
    """The nearest signed steps of `scales` [...] to `blocks` [..., block_size]."""
    limit = 1 << (bits - 1)
    safe = np.where(scales == 0, np.float32(1), scales)[..., None]
    steps: Floats = np.clip(np.rint(blocks / safe), -limit, limit - 1)
    return steps


def round_blocks(matrix: Floats, form: BlockFormat) -> BlockWeights:
    """Plain rounding of a matrix [out, in] to the nearest step."""
    blocks = blocks_of(matrix, form.block_size)
    scales = block_scales(blocks, form.bits)
    codes = (round_to(blocks, scales, form.bits) + form.zero_point).astype(np.uint8)
    return BlockWeights(form, codes, scales, matrix.shape[1])


def round_rows(matrix: Floats) -> RowWeights:
    """Plain rounding of a matrix [out, in] to int8, 63 steps to either side."""
    scales = np.abs(matrix).max(axis=1) / np.float32(ROW_LIMIT)
    safe = np.where(scales == 0, np.float32(1), scales).astype(np.float32)
    return RowWeights(np.rint(matrix / safe[:, None]).astype(np.int8), safe)
