"""Weights in the order in which the kernels read them: in 16 bits where that loses nothing."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import nn

from longshore_server.native.cpu import structs

LANES = 16  # of the kernels' vectors


class PackedMatrix:
    """A float32 weight [out, in] in panels; `order` says which of its rows becomes which output."""

    def __init__(
        self,
        library: ctypes.CDLL,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        order: torch.Tensor | None = None,
    ) -> None:
        self._library = library
        num_out, num_in = weight.shape
        kind = storage_kind(weight)
        rows = torch.arange(num_out, dtype=torch.int32) if order is None else order.to(torch.int32)
        weight = weight.contiguous()
        self._panels = torch.empty(library.packed_words(num_out, num_in, kind), dtype=torch.int32)
        library.pack_matrix(
            weight.data_ptr(), rows.data_ptr(), num_out, num_in, kind, self._panels.data_ptr()
        )
        self._bias = None if bias is None else bias.float()[rows.long()].contiguous()
        self.num_in, self.num_out = num_in, num_out
        self.struct = structs.Matrix(self._panels.data_ptr(), address(self._bias), num_in, num_out, kind)

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """[rows, in] to [rows, out]; for checks, since a step multiplies by itself."""
        rows = rows.contiguous()
        output = torch.empty(rows.shape[0], self.num_out)
        self._library.multiply_rows(self.struct, rows.data_ptr(), output.data_ptr(), rows.shape[0])
        return output


def storage_kind(weight: torch.Tensor) -> int:
    """bfloat16 where no weight loses a bit by it, as with most checkpoints; else float32."""
    is_exact = not bool((weight.view(torch.int32) & 0xFFFF).any())
    return structs.BFLOAT16 if is_exact else structs.FLOAT32


def pack_linears(library: ctypes.CDLL, linears: Sequence[nn.Linear]) -> PackedMatrix:
    """Linear layers that read the same rows, one behind the other."""
    return PackedMatrix(library, torch.cat([each.weight.detach() for each in linears]), _biases(linears))


def pack_gate_up(library: ctypes.CDLL, gate: nn.Linear, up: nn.Linear) -> PackedMatrix:
    """A vector of gates, then the vector of their ups, and so on: both are at hand when one is done."""
    weight = torch.cat([gate.weight.detach(), up.weight.detach()])
    numbers = torch.arange(weight.shape[0], dtype=torch.int32).view(2, -1, LANES)
    return PackedMatrix(library, weight, _biases([gate, up]), numbers.transpose(0, 1).flatten())


def address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _biases(linears: Sequence[nn.Linear]) -> torch.Tensor | None:
    if all(each.bias is None for each in linears):
        return None
    zeros = [torch.zeros(each.out_features) for each in linears]
    return torch.cat(
        [zero if each.bias is None else each.bias.detach() for zero, each in zip(zeros, linears, strict=True)]
    )
