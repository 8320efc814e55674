"""Compiles the kernels of a model's decodes ahead, rather than in the step that needs one.

A kernel takes a quarter of a second or more the first time, on a machine that has not kept it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import nn

from longshore_server.native.attention.interface import DecodeRows
from longshore_server.native.attention.kv_cache import PagedKVCache
from longshore_server.native.attention.triton_context import StepTables, TritonContext
from longshore_server.native.gemm.multiply import GpuGemm, few_rows_kernel
from longshore_server.native.gpu.mixed_steps import NO_SLOT
from longshore_server.native.model.fuse import FusedAttention

logger = logging.getLogger(__name__)


class KernelWarmer:
    """Runs each kind of attention and of product on zeros, once for each kernel of it, on its own thread."""

    def __init__(self, model: nn.Module, cache: PagedKVCache) -> None:
        few_rows = few_rows_kernel()
        self._cache = cache
        self._stream = torch.cuda.Stream(cache.device)
        self._executor = ThreadPoolExecutor(1, "warm-kernels")
        self._runs: list[Future[None]] = []
        for attention in _attentions(model):
            for num_rows in (1, 2):  # a product of one row is never in parts
                self._submit(self._attend, attention, num_rows)
        for product in _products(model):
            for num_rows in () if few_rows is None else few_rows.ROW_BLOCKS:
                self._submit(self._multiply, product, num_rows)
        self._executor.shutdown(wait=False)

    @property
    def is_done(self) -> bool:
        return all(run.done() for run in self._runs)

    def settle(self, timeout_s: float) -> None:
        """Waits for all of it, `timeout_s` at most."""
        wait([run for run in self._runs if not run.cancelled()], timeout_s)  # it would wait for those, too

    def close(self) -> None:
        """Begins no more; what is under way ends by itself."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _submit(self, work: Callable[[Any, int], None], module: nn.Module, num_rows: int) -> None:
        self._runs.append(self._executor.submit(self._run, work, module, num_rows))

    @torch.inference_mode()
    def _run(self, work: Callable[[Any, int], None], module: nn.Module, num_rows: int) -> None:
        try:
            with torch.cuda.stream(self._stream):  # it sets the device, too
                work(module, num_rows)
        except RuntimeError:  # a step that needs it says so to its requests
            logger.exception("a %s of %d rows fails", type(module).__name__, num_rows)

    def _multiply(self, product: nn.Module, num_rows: int) -> None:
        product(self._zero_rows(product, num_rows))

    def _attend(self, attention: FusedAttention, num_rows: int) -> None:
        """Rows without context, over a cache of one layer."""
        of, device = self._cache, self._cache.device
        cache = PagedKVCache([attention.kv_geometry], 1, of.block_size, of.dtype, device)
        zeros = torch.zeros(num_rows, dtype=torch.int64, device=device)
        tables = StepTables(
            slots=torch.full_like(zeros, NO_SLOT),
            block_tables=torch.zeros(1, 1, dtype=torch.int32, device=device),
            num_decodes=num_rows,
            decodes=DecodeRows(zeros, zeros, zeros),
            arrivals=torch.zeros(num_rows * attention.num_kv_heads, dtype=torch.int32, device=device),
        )
        context = TritonContext(cache, tables)
        rows = self._zero_rows(attention.qkv, num_rows)
        angles = torch.zeros(num_rows, attention.head_dim, dtype=rows.dtype, device=device)
        product = attention.product(rows, angles, angles)
        if context.takes(0, product):
            context.attend_product(0, product, attention.scale, attention.window)

    def _zero_rows(self, product: nn.Module, num_rows: int) -> torch.Tensor:
        weight: torch.Tensor = product.weight  # type: ignore[assignment]
        dtype = getattr(product, "dtype", weight.dtype)  # what FP8 was made of
        return torch.zeros(num_rows, weight.shape[1], dtype=dtype, device=self._cache.device)


def _products(model: nn.Module) -> list[nn.Module]:
    """The modules whose weights are multiplied by a GpuGemm, one of each shape and type."""
    kinds: dict[tuple[object, ...], nn.Module] = {}
    for module in model.modules():
        if isinstance(getattr(module, "gemm", None), GpuGemm):
            weight: torch.Tensor = module.weight  # type: ignore[assignment]
            kinds.setdefault((type(module), weight.shape, weight.dtype), module)
    return list(kinds.values())


def _attentions(model: nn.Module) -> list[FusedAttention]:
    """Those whose product is multiplied by a GpuGemm, one of each kind that has a kernel of its own."""
    kinds: dict[tuple[object, ...], FusedAttention] = {}
    for module in model.modules():
        if not isinstance(module, FusedAttention):
            continue
        qkv: Any = module.qkv
        if isinstance(qkv.gemm, GpuGemm):
            heads = (module.num_heads, module.num_kv_heads, module.head_dim)
            forms = (qkv.weight.dtype, module.window is None, module.q_norm is None)
            kinds.setdefault((heads, forms), module)
    return list(kinds.values())
