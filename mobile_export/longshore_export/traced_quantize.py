"""Quantized forms of a model that is traced: its linear layers as the runtime's own operators, or emulated.

Works on any transformers model, since it goes by module and not by name. What is no linear layer and no
embedding, such as the experts of a mixture, stays in fp32. Rounds as `quantize` does, traces nothing itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from longshore.errors import ExportError
from longshore_export.graph_parts import CONTRIB_DOMAIN, INT8_ACTIVATIONS, Quantized, Rounding
from longshore_export.quantize import BlockFormat, BlockWeights, DerivedFormat, RowFormat, RowWeights
from longshore_export.quantize_emulate import RoundedLinear
from longshore_export.quantize_recipe import Recipe

_NUM_TRIED = 16  # rows of an embedding that are looked at
Make = Callable[[Quantized, Tensor | None], nn.Module]


def with_operators(model: Any, recipe: Recipe, rounding: Rounding) -> Any:
    """A copy whose linear layers and embedding become operators of the runtime when it is traced."""
    return _replaced(model, recipe, rounding, _Product, _Rows)


def emulate_traced(model: Any, recipe: Recipe, rounding: Rounding) -> Any:
    """A copy that computes in torch what the graph of `with_operators` does: the oracle for its parity."""
    return _replaced(model, recipe, rounding, _emulated, _plain_rows)


def _replaced(
    model: Any,
    recipe: Recipe,
    rounding: Rounding,
    linear: Make,
    rows: Callable[[BlockWeights, nn.Embedding], nn.Module],
) -> Any:
    rounded = copy.deepcopy(model)
    head, embedding = rounded.get_output_embeddings(), rounded.get_input_embeddings()
    for name, parent, key, module in list(_linear_layers(rounded)):
        form = recipe.head if module is head else recipe.linear
        if isinstance(form, DerivedFormat) or recipe.exceptions:
            raise ExportError(f"variant {recipe.name} is for built graphs alone")
        if form is not None:
            weight = module.weight.detach()
            matrix = weight.T if isinstance(module, Conv1D) else weight
            setattr(parent, key, linear(rounding(name, matrix.contiguous().numpy(), form), module.bias))
    scale = _scale_of(embedding)
    if recipe.embedding is not None and scale is not None and _is_whole(embedding, recipe.embedding):
        weights = rounding("embedding", embedding.weight.detach().numpy(), recipe.embedding)
        assert isinstance(weights, BlockWeights)
        rounded.set_input_embeddings(_Scaled(rows(weights, embedding), scale))
    return rounded.eval()


def _linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Any]]:
    """(name, parent, name in it, module) of each; no subclass, whose `forward` may do anything."""
    for path, parent in model.named_modules():
        for key, module in parent.named_children():
            if type(module) in (nn.Linear, Conv1D):
                yield f"{path}.{key}" if path else key, parent, key, module


@torch.no_grad()
def _scale_of(embedding: Any) -> float | None:
    """What an embedding multiplies its rows by; None where it does anything else."""
    if type(embedding) is nn.Embedding:
        return 1.0
    scale = getattr(embedding, "embed_scale", None)
    if not isinstance(embedding, nn.Embedding) or scale is None:
        return None
    ids = torch.arange(min(embedding.num_embeddings, _NUM_TRIED))
    is_scaled = torch.allclose(embedding(ids), embedding.weight[ids] * float(scale))
    return float(scale) if is_scaled else None


def _is_whole(embedding: Any, form: BlockFormat) -> bool:
    return bool(embedding.weight.shape[1] % form.block_size == 0)


class _Scaled(nn.Module):
    """Rows times a number."""

    def __init__(self, rows: nn.Module, scale: float) -> None:
        super().__init__()
        self.rows, self._scale = rows, scale

    def forward(self, token_ids: Tensor) -> Tensor:
        """[1, tokens] to [1, tokens, width]."""
        rows: Tensor = self.rows(token_ids)
        return rows if self._scale == 1.0 else rows * self._scale


class _Product(nn.Module):
    """A linear layer as MatMulNBits or DynamicQuantizeMatMul; computes nothing outside a trace."""

    def __init__(self, weights: Quantized, bias: Tensor | None) -> None:
        super().__init__()
        self._attributes: dict[str, Any] = {}
        if isinstance(weights, BlockWeights):
            form = weights.format
            tensors = [torch.from_numpy(weights.packed()), torch.from_numpy(weights.scales)]
            self._operator, self._num_outputs = "MatMulNBits", len(weights.codes)
            self._attributes = {
                "K": weights.num_inputs, "N": self._num_outputs, "bits": form.bits,
                "block_size": form.block_size, "accuracy_level": INT8_ACTIVATIONS,
            }  # fmt: skip
        else:
            assert isinstance(weights, RowWeights)
            codes = torch.from_numpy(weights.codes)
            tensors = [codes.T.contiguous(), torch.from_numpy(weights.scales), torch.zeros(len(codes)).char()]
            self._operator, self._num_outputs = "DynamicQuantizeMatMul", len(codes)
        for index, tensor in enumerate(tensors):
            self.register_buffer(f"tensor{index}", tensor)
        self._num_tensors = len(tensors)
        self.bias = bias

    def forward(self, values: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        tensors = [getattr(self, f"tensor{index}") for index in range(self._num_tensors)]
        out = torch.onnx.ops.symbolic(
            f"{CONTRIB_DOMAIN}::{self._operator}", (values, *tensors), self._attributes,
            dtype=torch.float32, shape=(*values.shape[:-1], self._num_outputs), version=1,
        )  # fmt: skip
        return out if self.bias is None else out + self.bias


class _Rows(nn.Module):
    """An embedding as GatherBlockQuantized; computes nothing outside a trace."""

    def __init__(self, weights: BlockWeights, embedding: nn.Embedding) -> None:
        super().__init__()
        packed = torch.from_numpy(weights.packed()).reshape(len(weights.codes), -1)
        self.register_buffer("codes", packed)
        self.register_buffer("scales", torch.from_numpy(weights.scales))
        self._width, self._format = embedding.embedding_dim, weights.format

    def forward(self, token_ids: Tensor) -> Tensor:
        """[1, tokens] to [1, tokens, width]."""
        form = self._format
        attributes = {
            "bits": form.bits, "block_size": form.block_size, "gather_axis": 0, "quantize_axis": 1,
        }  # fmt: skip
        return torch.onnx.ops.symbolic(
            f"{CONTRIB_DOMAIN}::GatherBlockQuantized", (self.codes, token_ids, self.scales), attributes,
            dtype=torch.float32, shape=(*token_ids.shape, self._width), version=1,
        )  # fmt: skip


def _emulated(weights: Quantized, bias: Tensor | None) -> nn.Module:
    form = weights.format if isinstance(weights, BlockWeights) else RowFormat()
    return RoundedLinear(torch.from_numpy(weights.dequantized()), bias, form)


def _plain_rows(weights: BlockWeights, embedding: nn.Embedding) -> nn.Module:
    return nn.Embedding.from_pretrained(torch.from_numpy(weights.dequantized()))
