"""Compiles the kernels of a model's products beside its first steps, rather than in the step that needs one.

A kernel of few rows takes a quarter of a second the first time, on a machine that has not kept it.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from longshore_server.native.gemm.multiply import GpuGemm, few_rows_kernel

logger = logging.getLogger(__name__)


class ProductWarmer:
    """Runs a product of each kind on zeros, of every number of rows that has a kernel, on its own thread."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        few_rows = few_rows_kernel()
        row_counts = () if few_rows is None else few_rows.ROW_BLOCKS
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._executor = ThreadPoolExecutor(1, "warm-products")
        for product in _kinds(model):
            for num_rows in row_counts:
                self._executor.submit(self._run, product, num_rows)
        self._executor.shutdown(wait=False)

    def close(self) -> None:
        """Begins no more; what is under way ends by itself."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    @torch.inference_mode()
    def _run(self, product: nn.Module, num_rows: int) -> None:
        try:
            with torch.cuda.stream(self._stream):  # it sets the device, too
                weight: torch.Tensor = product.weight  # type: ignore[assignment]
                dtype = getattr(product, "dtype", weight.dtype)  # what FP8 was made of
                product(torch.zeros(num_rows, weight.shape[1], dtype=dtype, device=self._device))
        except RuntimeError:  # a step that needs it says so to its requests
            logger.exception("a product of %s rows by %s fails", num_rows, tuple(weight.shape))


def _kinds(model: nn.Module) -> list[nn.Module]:
    """The modules whose weights are multiplied by a GpuGemm, one of each shape and type."""
    kinds: dict[tuple[object, ...], nn.Module] = {}
    for module in model.modules():
        if isinstance(getattr(module, "gemm", None), GpuGemm):
            weight: torch.Tensor = module.weight  # type: ignore[assignment]
            kinds.setdefault((type(module), weight.shape, weight.dtype), module)
    return list(kinds.values())
