"""Linear layers for CPUs: weights packed once, whose rows do not depend on how many there are.

Each row's result is the same to the last bit in every batch, which torch's own BLAS does not promise. It
replaces plain float32 nn.Linear modules only: by half-precision ones where no weight loses a bit, else by
oneDNN's, which are faster than the plain layer from 2 to 64 rows.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

from longshore_server.native.model.cpu_half_linear import HalfPackedLinear, exact_scale

# oneDNN chooses the packing for an expected number of rows; 32 was the fastest over 2..512 rows.
EXPECTED_ROWS = 32
# A single row would take another kernel, with another order of summation; four equal rows are also faster.
SINGLE_ROW_COPIES = 4


class PackedLinear(nn.Module):
    """A float32 linear layer over a weight packed by oneDNN; gradients are not supported."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), EXPECTED_ROWS)
        self.packed: torch.Tensor
        self.register_buffer("packed", packed, persistent=False)
        self.bias = linear.bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if inputs.numel() != self.in_features:
            return self._multiply(inputs)
        copies = inputs.reshape(1, self.in_features).expand(SINGLE_ROW_COPIES, -1)
        return self._multiply(copies)[0].view(*inputs.shape[:-1], self.out_features)

    def _multiply(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(  # type: ignore[no-any-return]
            rows, self.packed, self.bias, "none", [], ""
        )

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


@cache
def is_available() -> bool:
    """Whether this build of torch has the packed kernels, and they are row-invariant on this CPU."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        return _is_row_invariant()
    except (AttributeError, RuntimeError):
        return False


@torch.inference_mode()
def pack_linears(model: nn.Module) -> int:
    """Replaces the plain float32 linear layers in place and returns how many there were."""
    linears = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear
        and child.weight.dtype == torch.float32
        and child.weight.device.type == "cpu"
    ]
    for parent, name, linear in linears:
        setattr(parent, name, packed_form(linear))
    return len(linears)


def packed_form(linear: nn.Linear) -> PackedLinear | HalfPackedLinear:
    """The faster of the forms that a float32 layer on a CPU can take without a change of its weights."""
    scale = exact_scale(linear.weight)
    return PackedLinear(linear) if scale is None else HalfPackedLinear(linear, scale)


@torch.inference_mode()
def _is_row_invariant() -> bool:
    linear: nn.Linear = nn.utils.skip_init(nn.Linear, 200, 100, bias=False)
    linear.weight.copy_(torch.arange(200.0 * 100).sin().view(100, 200))
    packed = PackedLinear(linear)
    rows = torch.linspace(-3.0, 3.0, 40 * 200).sin().view(40, 200)
    whole = packed(rows)
    return all(
        torch.equal(packed(rows[start : start + count]), whole[start : start + count])
        for start, count in ((0, 1), (7, 1), (3, 2), (5, 16), (0, 33))
    )
