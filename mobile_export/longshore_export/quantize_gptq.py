"""Rounding that knows what the weights are multiplied with (GPTQ, Frantar et al., arXiv 2210.17323).

A column's rounding error is taken up by the columns that are yet to be rounded, as far as calibration
activations say that they move together. int8 rows are rounded plainly: there is next to nothing to win.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from longshore_export.graph import Quantized
from longshore_export.quantize import (
    BlockFormat,
    BlockWeights,
    Floats,
    RowFormat,
    block_scales,
    blocks_of,
    round_blocks,
    round_rows,
    round_to,
)
from longshore_export.quantize_emulate import PARTS

DAMPING = 0.01  # of the mean diagonal, so that directions never seen don't blow up

Moments = dict[str, NDArray[np.float64]]


@torch.no_grad()
def measure_moments(model: Any, prompts: Sequence[Sequence[int] | torch.Tensor]) -> Moments:
    """The second moments [in, in] of what goes into each part, over whole prompts.

    A prompt is token ids, or its embeddings [tokens, hidden], as of one with pictures.
    """
    moments: Moments = {}

    def watch(part: str, module: Any) -> Any:
        def add(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            rows = inputs[0].reshape(-1, inputs[0].shape[-1]).double()
            moments[part] = moments.get(part, 0) + (rows.T @ rows).numpy()

        return module.register_forward_pre_hook(add)

    hooks = [watch("head", model.lm_head)]
    for index, layer in enumerate(model.model.layers):
        for part, (place, names) in PARTS.items():
            hooks.append(watch(f"layer{index}.{part}", getattr(getattr(layer, place), names[0])))
    try:
        for prompt in prompts:
            if isinstance(prompt, torch.Tensor):
                model(inputs_embeds=prompt[None])
            else:
                model(torch.tensor([list(prompt)]))
    finally:
        for hook in hooks:
            hook.remove()
    return moments


class GptqRounding:
    """A rounding for `build_graph` that goes by moments; parts without any are rounded plainly."""

    def __init__(self, moments: Moments) -> None:
        self._moments = moments
        self._done: dict[tuple[str, BlockFormat], BlockWeights] = {}

    def __call__(self, part: str, matrix: Floats, form: BlockFormat | RowFormat) -> Quantized:
        if isinstance(form, RowFormat):
            return round_rows(matrix)
        if part not in self._moments:
            return round_blocks(matrix, form)
        key = (part, form)
        if key not in self._done:
            self._done[key] = round_by_moments(matrix, form, self._moments[part])
        return self._done[key]


def round_by_moments(matrix: Floats, form: BlockFormat, moments: NDArray[np.float64]) -> BlockWeights:
    """Round a matrix [out, in] from left to right; `moments` [in, in] are of its inputs."""
    carry = _carry(moments)
    rest = matrix.astype(np.float64)
    num_inputs, size = matrix.shape[1], form.block_size
    blocks = blocks_of(matrix, size)
    codes = np.full(blocks.shape, form.zero_point, np.uint8)
    scales = np.zeros(blocks.shape[:2], np.float32)
    for index, begin in enumerate(range(0, num_inputs, size)):
        end = min(begin + size, num_inputs)
        scales[:, index] = block_scales(
            blocks_of(rest[:, begin:end].astype(np.float32), size)[:, 0], form.bits
        )
        errors = np.zeros((len(matrix), end - begin))
        for column in range(begin, end):
            wanted = rest[:, column]
            steps = round_to(wanted.astype(np.float32)[:, None], scales[:, index], form.bits)[:, 0]
            codes[:, index, column - begin] = steps + form.zero_point
            error = (wanted - steps * scales[:, index]) / carry[column, column]
            rest[:, column + 1 : end] -= np.outer(error, carry[column, column + 1 : end])
            errors[:, column - begin] = error
        rest[:, end:] -= errors @ carry[begin:end, end:]
    return BlockWeights(form, codes, scales, num_inputs)


def _carry(moments: NDArray[np.float64]) -> NDArray[np.float64]:
    """The upper Cholesky factor of the inverse moments: how much of an error each later column takes up."""
    damped = moments.copy()
    diagonal = np.einsum("ii->i", damped)
    diagonal[diagonal == 0] = 1.0
    diagonal += DAMPING * diagonal.mean()
    factor: NDArray[np.float64] = np.linalg.cholesky(np.linalg.inv(damped)).T
    return factor
