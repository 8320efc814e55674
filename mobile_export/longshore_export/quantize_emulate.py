"""A torch model that rounds weights and activations as the quantized graph does: the oracle for its parity.

Knows formats and transformers' module names; runs no ONNX.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longshore_export.graph import Quantized, Rounding
from longshore_export.quantize import BlockFormat, DerivedFormat, RowFormat, WeightFormat, round_rows
from longshore_export.quantize_recipe import Recipe

PARTS = {
    "qkv": ("self_attn", ("q_proj", "k_proj", "v_proj")),
    "o": ("self_attn", ("o_proj",)),
    "gate": ("mlp", ("gate_proj",)),
    "up": ("mlp", ("up_proj",)),
    "down": ("mlp", ("down_proj",)),
}


def emulate(model: Any, recipe: Recipe, rounding: Rounding) -> Any:
    """A copy of a transformers model in fp32 that computes what the recipe's graph computes."""
    rounded = copy.deepcopy(model)
    embedding = rounded.model.embed_tokens.weight.detach()
    head = rounded.lm_head.weight.detach().clone()  # a tied head is rounded by itself
    for index, layer in enumerate(rounded.model.layers):
        for part, (place, names) in PARTS.items():
            name = f"layer{index}.{part}"
            round_together(getattr(layer, place), names, recipe.format_of(name), rounding, name)
    rounded.lm_head = nn.Linear(head.shape[1], head.shape[0], bias=False)
    rounded.lm_head.weight = nn.Parameter(head)
    round_together(rounded, ("lm_head",), recipe.format_of("head"), rounding, "head")
    if recipe.embedding is not None:
        matrix = rounding("embedding", embedding.numpy(), recipe.embedding).dequantized()
        rounded.model.embed_tokens.weight = nn.Parameter(torch.from_numpy(matrix))
    return rounded.eval()


def round_activations(values: Tensor, form: BlockFormat | RowFormat) -> Tensor:
    """Activations [..., in] as the kernels see them: int8 per block of a row, or bytes per call."""
    if isinstance(form, RowFormat):
        low, high = values.amin().clamp(max=0.0), values.amax().clamp(min=0.0)
        scale = ((high - low) / 255).clamp(min=1e-30)
        zero = (-low / scale).round().clamp(0, 255)
        return (((values / scale).round() + zero).clamp(0, 255) - zero) * scale
    width = values.shape[-1]
    blocks = F.pad(values, (0, -width % form.block_size)).unflatten(-1, (-1, form.block_size))
    scales = (blocks.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
    return ((blocks / scales).round() * scales).flatten(-2)[..., :width]


class RoundedLinear(nn.Module):
    """A linear layer of rounded weights that rounds its activations too."""

    def __init__(self, matrix: Tensor, bias: Tensor | None, form: BlockFormat | RowFormat) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(matrix), bias
        self._form = form

    def forward(self, values: Tensor) -> Tensor:
        return F.linear(round_activations(values, self._form), self.weight, self.bias)


def round_together(
    parent: Any, names: tuple[str, ...], form: WeightFormat, rounding: Rounding, part: str
) -> None:
    """Replace the linear modules that one product of the graph computes side by side."""
    if form is None:
        return
    modules = [getattr(parent, name) for name in names]
    matrix = np.concatenate([module.weight.detach().numpy() for module in modules])
    if isinstance(form, DerivedFormat):
        rounded: Quantized = round_rows(rounding(part, matrix, form.source).dequantized())
        form = RowFormat()
    else:
        rounded = rounding(part, matrix, form)
    pieces = torch.from_numpy(rounded.dequantized()).split([len(module.weight) for module in modules])
    for name, module, piece in zip(names, modules, pieces, strict=True):
        setattr(parent, name, RoundedLinear(piece.clone(), module.bias, form))
