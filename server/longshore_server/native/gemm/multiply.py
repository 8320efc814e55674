"""Ways to multiply rows by a weight, one for all products of a model; `gemm_for` picks it for an engine."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Protocol

import torch
from torch.nn.functional import linear

from longshore_server.native.config import EngineConfig
from longshore_server.native.gemm.cublaslt import (
    CublasLt,
    CublasLtError,
    Matmul,
    cublaslt_of,
    is_aligned,
)
from longshore_server.native.gemm.plans import Plans, Product, dtype_name, find_plans
from longshore_server.native.model.fp8 import FP8_DTYPE, unit_scale

logger = logging.getLogger(__name__)

KEPT_MATMULS = 4096  # prompts come in many lengths


class Gemm(Protocol):
    """Rows [tokens, in] times a weight [out, in] transposed, plus the bias [out]: [tokens, out] in `dtype`.

    FP8 rows go with an FP8 weight, and without a bias: the product is unscaled. On a GPU `dtype` is
    bfloat16 then, whose range holds every unscaled sum. Who can add up says `may_split`, and may be given
    [parts, tokens, out] in float32, whose sum over the parts is the product.
    """

    def __call__(
        self,
        rows: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        may_split: bool = False,
    ) -> torch.Tensor: ...


def multiply_by_torch(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    may_split: bool = False,
) -> torch.Tensor:
    """As the library would on its own; on a CPU FP8 is computed in float32 over the same values."""
    if rows.dtype != FP8_DTYPE:
        return linear(rows, weight, bias)
    if rows.device.type != "cuda":
        return (rows.float() @ weight.float().t()).to(dtype)
    one = unit_scale(rows.device)
    return torch._scaled_mm(rows, weight.t(), scale_a=one, scale_b=one, out_dtype=dtype, use_fast_accum=True)


def multiply_invariant(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    may_split: bool = False,
) -> torch.Tensor:
    """For CUDA only: each row has the same bits among any number of others."""
    from longshore_server.native.gemm import triton_invariant  # triton is on GPUs only

    return triton_invariant.multiply(rows, weight, bias, dtype)


def few_rows_kernel() -> ModuleType | None:
    """The module `gluon_few_rows`; None where Triton is not the one whose Gluon it is written in."""
    from longshore_server.native.gpu.gluon import knows_gluon  # triton is on GPUs only

    if not knows_gluon():
        return None
    from longshore_server.native.gemm import gluon_few_rows

    return gluon_few_rows


class GpuGemm:
    """The fastest way known: our own kernels for one row and few, a measured algorithm, or torch's choice."""

    def __init__(self, lt: CublasLt | None, tables: Sequence[Plans]) -> None:
        """The tables are for this GPU and this library, the first one that has a plan counts."""
        self._lt = lt
        self._tables = tables if lt is not None else ()
        self._matmul = functools.lru_cache(KEPT_MATMULS)(self._make_matmul)

    def __call__(
        self,
        rows: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        may_split: bool = False,
    ) -> torch.Tensor:
        if rows.is_cuda:
            from longshore_server.native.gemm import triton_gemv  # triton is on GPUs only

            if triton_gemv.can_multiply(rows, weight):
                return triton_gemv.multiply_row(rows, weight, bias, dtype)
            few_rows = few_rows_kernel()
            if few_rows is not None and bias is None and few_rows.can_multiply(rows, weight):
                return few_rows.multiply_few_rows(rows, weight, dtype, may_split)
        return self.multiply_by_library(rows, weight, bias, dtype)

    def multiply_by_library(
        self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """By a measured algorithm or torch's choice."""
        if self._tables and bias is None and is_aligned(rows) and is_aligned(weight):
            matmul = self._matmul(rows.dtype, dtype, rows.shape[0], *weight.shape)
            if matmul is not None:
                return matmul(rows, weight)
        return multiply_by_torch(rows, weight, bias, dtype)

    def _make_matmul(
        self, dtype: torch.dtype, out_dtype: torch.dtype, num_rows: int, num_outputs: int, width: int
    ) -> Matmul | None:
        product = Product(dtype_name(dtype), num_outputs, width)
        algorithm = next(filter(None, (each.find(product, num_rows) for each in self._tables)), None)
        if algorithm is None or self._lt is None:
            return None
        try:
            return Matmul(self._lt, product, num_rows, out_dtype, algorithm)
        except CublasLtError as error:
            logger.warning("%d rows of %s are multiplied as torch chooses: %s", num_rows, product, error)
            return None


def gemm_for(config: EngineConfig) -> Gemm:
    """How this engine's products are multiplied; raises ModelLoadError for a table that cannot be read."""
    if config.has_invariant_kernels:
        return multiply_invariant
    device = torch.device(config.device)
    if device.type != "cuda" or not torch.cuda.is_available():
        return multiply_by_torch
    if not config.gemm_plans:
        return GpuGemm(None, [])
    return GpuGemm(*_tables_for(device, Path(config.model)))


def _tables_for(device: torch.device, folder: Path) -> tuple[CublasLt | None, list[Plans]]:
    index = torch.cuda.current_device() if device.index is None else device.index
    try:
        lt = cublaslt_of(torch.device("cuda", index))
    except CublasLtError as error:
        logger.warning("products are multiplied as torch chooses: %s", error)
        return None, []
    return lt, find_plans(torch.cuda.get_device_name(index), lt.version, folder)
