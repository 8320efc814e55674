"""Matrix products of a fused layer: plain or FP8 weights, several linear layers merged into one.

A product takes rows and gives a ScaledOutput for the fused operation behind it; it knows no layer. How it
multiplies is its `gemm`'s business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from longshore_server.native.gemm.multiply import Gemm, multiply_by_torch
from longshore_server.native.model import fp8, fused_ops
from longshore_server.native.model.fp8 import Fp8Rows, ScaledOutput
from longshore_server.native.model.fused_ops import Rows


class Product(Protocol):
    """What a fused layer asks of its matrix products; `takes_fp8` says which rows to hand over."""

    takes_fp8: bool

    def __call__(self, rows: Rows) -> ScaledOutput: ...


class PlainProduct(nn.Module):
    """One weight [out, in] in the model's dtype, of one or more linear layers that read the same rows."""

    takes_fp8 = False

    def __init__(self, linears: Sequence[nn.Linear], gemm: Gemm = multiply_by_torch) -> None:
        super().__init__()
        self.weight = _frozen(_merged([each.weight for each in linears]))
        self.bias = _merged_bias(linears)
        self.gemm = gemm

    def forward(self, rows: torch.Tensor) -> ScaledOutput:
        return ScaledOutput(self.gemm(rows, self.weight, self.bias, rows.dtype, may_split=True))


class Fp8Product(nn.Module):
    """The same in FP8, a scale per output channel; rows that are not FP8 yet are quantized first."""

    takes_fp8 = True

    def __init__(self, linears: Sequence[nn.Linear], gemm: Gemm = multiply_by_torch) -> None:
        super().__init__()
        parts = [fused_ops.quantize_rows(each.weight) for each in linears]
        merged = _merged([part.values.view(torch.uint8) for part in parts])
        self.weight: torch.Tensor
        self.scales: torch.Tensor
        self.register_buffer("weight", merged.view(fp8.FP8_DTYPE), persistent=False)
        self.register_buffer("scales", _merged([part.scales for part in parts]), persistent=False)
        self.bias = _merged_bias(linears)
        self.dtype = linears[0].weight.dtype
        self.gemm = gemm

    def forward(self, rows: Rows) -> ScaledOutput:
        quantized = rows if isinstance(rows, Fp8Rows) else fused_ops.quantize_rows(rows)
        values = self.gemm(quantized.values, self.weight, None, self.dtype, may_split=True)
        return ScaledOutput(values, quantized.scales, self.scales, self.bias)


class ModuleProduct(nn.Module):
    """A layer that is more than its weight (one shared out over ranks, say), called as it is."""

    takes_fp8 = False

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, rows: torch.Tensor) -> ScaledOutput:
        return ScaledOutput(self.module(rows))


class Fp8Linear(nn.Module):
    """Stands in for one nn.Linear where its neighbours are not fused: scales are applied here."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.product = Fp8Product([layer])

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        output = self.product(inputs.reshape(-1, self.in_features)).resolve(inputs.dtype)
        return output.view(*inputs.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class GemmLinear(nn.Module):
    """Stands in for one nn.Linear, over its weight."""

    def __init__(self, layer: nn.Linear, gemm: Gemm) -> None:
        super().__init__()
        self.gemm = gemm
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        rows = inputs.reshape(-1, self.in_features)
        output = self.gemm(rows, self.weight, self.bias, inputs.dtype)
        return output.view(*inputs.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def can_be_fp8(module: nn.Module) -> bool:
    """Whether this is a plain linear layer whose sides FP8 products can take."""
    if type(module) is not nn.Linear:
        return False
    multiple = fp8.SCALED_MM_MULTIPLE
    return module.in_features % multiple == 0 and module.out_features % multiple == 0


def make_product(modules: Sequence[nn.Module], to_fp8: bool, gemm: Gemm = multiply_by_torch) -> Product:
    """One product over all `modules`, which read the same rows; FP8 where it is asked for and possible."""
    if len(modules) == 1 and type(modules[0]) is not nn.Linear:
        own: Product | None = getattr(modules[0], "as_product", lambda *_: None)(to_fp8, gemm)
        return ModuleProduct(modules[0]) if own is None else own
    linears = [module for module in modules if isinstance(module, nn.Linear)]
    if to_fp8 and all(can_be_fp8(each) for each in linears):
        return Fp8Product(linears, gemm)
    return PlainProduct(linears, gemm)


def replace_linears(module: nn.Module) -> int:
    """Puts FP8 layers in place of plain ones below `module`; returns how many there were."""
    return _replace(module, can_be_fp8, Fp8Linear)


def multiply_linears_by(module: nn.Module, gemm: Gemm) -> int:
    """Puts layers that multiply so in place of plain ones below `module`; returns how many there were."""
    return _replace(module, lambda child: type(child) is nn.Linear, lambda child: GemmLinear(child, gemm))


def _replace(
    module: nn.Module, is_wanted: Callable[[nn.Module], bool], make: Callable[[Any], nn.Module]
) -> int:
    found = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if is_wanted(child)
    ]
    for parent, name, child in found:
        setattr(parent, name, make(child))
    return len(found)


def _merged(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat([part.detach() for part in parts])


def _merged_bias(linears: Sequence[nn.Linear]) -> nn.Parameter | None:
    if all(each.bias is None for each in linears):
        return None
    parts = [
        each.weight.new_zeros(each.weight.shape[0]) if each.bias is None else each.bias for each in linears
    ]
    return _frozen(_merged(parts))


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)
