"""`bench core` with weights as vLLM's `dummy` format draws them: PYTHONPATH=server:sdk_python python3 FILE.

Every weight, the norms' too, is uniform from +-0.001, and a row's scale in FP8 is 1 / (448 * 512) at least.
bench_products_gpu.py shows what that makes of a product's operands. All flags are those of `bench core`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

import triton.language as tl
from torch import nn

from longshore_server.native.bench.command import main
from longshore_server.native.model import random_weights, triton_rows

LEAST_AMAX = 1 / 512


def _initialize(self: random_weights.RandomWeights, modules: Iterable[nn.Module]) -> None:
    for module in modules:
        for parameter in module.parameters(recurse=False):
            if parameter.device.type != "meta":
                parameter.data.uniform_(-1e-3, 1e-3)


if __name__ == "__main__":
    random_weights.RandomWeights._initialize = _initialize  # type: ignore[method-assign]
    triton_rows.MIN_AMAX = tl.constexpr(LEAST_AMAX)
    sys.exit(main())
