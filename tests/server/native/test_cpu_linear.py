"""Packed linear layers: the numbers of nn.Linear, and rows that are equal bits in every batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from longshore_server.native.model.cpu_linear import PackedLinear, is_available, pack_linears

pytestmark = pytest.mark.skipif(not is_available(), reason="this torch has no packed kernels for this CPU")


SHAPES = [(64, 64), (384, 1024), (100, 250), (64, 300), (1, 7), (4096, 4096)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_equals_linear_and_rows_are_invariant(shape, bias) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(*shape, bias=bias)
    packed = PackedLinear(linear)
    rows = torch.randn(70, shape[0])
    whole = packed(rows)
    assert torch.allclose(whole, linear(rows), atol=2e-3)
    for start, count in ((0, 1), (69, 1), (3, 2), (1, 16), (2, 33), (10, 60)):
        assert torch.equal(packed(rows[start : start + count]), whole[start : start + count])
    assert torch.equal(packed(rows[None])[0], whole)


@torch.inference_mode()
def test_rows_are_equal_bits_for_any_number_of_threads() -> None:
    torch.manual_seed(1)
    packed = PackedLinear(nn.Linear(1024, 384))
    rows = torch.randn(40, 1024)
    one_thread = packed(rows)
    torch.set_num_threads(2)
    try:
        assert torch.equal(packed(rows), one_thread)
        assert torch.equal(packed(rows[7:8]), one_thread[7:8])
    finally:
        torch.set_num_threads(1)


def test_packs_plain_float32_layers_only() -> None:
    class Special(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(8, 8), Special(8, 8), nn.Linear(8, 8, dtype=torch.bfloat16), nn.ReLU())
    assert pack_linears(model) == 1
    assert isinstance(model[0], PackedLinear) and type(model[1]) is Special
