"""Half-precision packed layers: exact weights, float32 sums, rows that are equal bits in every batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from longshore_server.native.model.cpu_half_linear import (
    BLOCK_ROWS,
    HalfPackedLinear,
    exact_scale,
    is_available,
    padded_rows,
)
from longshore_server.native.model.cpu_linear import PackedLinear, pack_linears

pytestmark = pytest.mark.skipif(not is_available(), reason="this torch has no FBGEMM for this CPU")


def bf16_linear(num_in: int, num_out: int, *, bias: bool = False, spread: float = 1.0) -> nn.Linear:
    """A float32 layer whose weights came from bf16."""
    torch.manual_seed(0)
    linear = nn.Linear(num_in, num_out, bias=bias)
    with torch.no_grad():
        linear.weight.copy_((torch.randn_like(linear.weight) * spread).bfloat16())
    return linear


def packed(linear: nn.Linear) -> HalfPackedLinear:
    scale = exact_scale(linear.weight)
    assert scale is not None
    return HalfPackedLinear(linear, scale)


@pytest.mark.parametrize("shape", [(64, 64), (384, 1024), (100, 250), (1100, 33), (1, 7)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_equals_linear_and_rows_are_invariant(shape: tuple[int, int], bias: bool) -> None:
    linear = bf16_linear(*shape, bias=bias)
    layer = packed(linear)
    rows = torch.randn(3 * BLOCK_ROWS + 7, shape[0])
    whole = layer(rows)
    exact = rows.double() @ linear.weight.double().t() + (linear.bias.double() if bias else 0.0)
    assert (whole - exact).abs().max() < 1e-6 * exact.abs().max() * max(1, shape[0] ** 0.5)
    for count in (*range(1, 36), BLOCK_ROWS - 1, BLOCK_ROWS, BLOCK_ROWS + 1, 2 * BLOCK_ROWS + 2):
        for start in (0, 5):
            assert torch.equal(layer(rows[start : start + count]), whole[start : start + count])
    assert torch.equal(layer(rows[None])[0], whole)
    assert torch.equal(layer(rows[3]), whole[3])


@torch.inference_mode()
def test_rows_are_equal_bits_for_any_number_of_threads() -> None:
    layer = packed(bf16_linear(1024, 384))
    rows = torch.randn(40, 1024)
    one_thread = layer(rows)
    torch.set_num_threads(2)
    try:
        assert torch.equal(layer(rows), one_thread)
        assert torch.equal(layer(rows[7:8]), one_thread[7:8])
    finally:
        torch.set_num_threads(1)


def test_a_scale_is_a_power_of_two_that_loses_no_bit() -> None:
    assert exact_scale(bf16_linear(64, 64, spread=1.0).weight.round()) == 1.0
    for spread in (1e-6, 1e-3, 1e5):  # beyond half floats unless scaled
        weight = bf16_linear(64, 64, spread=spread).weight
        scale = exact_scale(weight)
        assert scale is not None and torch.tensor(scale).log2() % 1 == 0
        assert torch.equal((weight * scale).half().float() / scale, weight)


def test_weights_that_would_lose_a_bit_keep_float32() -> None:
    torch.manual_seed(0)
    assert exact_scale(torch.randn(64, 64)) is None
    assert exact_scale(torch.tensor([[1.0, 2.0**-40]])) is None
    assert exact_scale(torch.tensor([[1.0, float("nan")]])) is None
    assert exact_scale(torch.zeros(4, 4)) == 1.0
    model = nn.Sequential(bf16_linear(8, 8), nn.Linear(8, 8))
    assert pack_linears(model) == 2
    assert isinstance(model[0], HalfPackedLinear) and isinstance(model[1], PackedLinear)


def test_rows_are_padded_past_the_small_kernels() -> None:
    assert padded_rows(BLOCK_ROWS) == BLOCK_ROWS and padded_rows(5 * BLOCK_ROWS) == 5 * BLOCK_ROWS
    for num_rows in range(1, 4 * BLOCK_ROWS):
        assert num_rows <= padded_rows(num_rows) <= num_rows + 5
