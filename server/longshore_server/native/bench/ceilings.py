"""What the device can do, measured in the same run: a big copy, and a big matrix product."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from longshore_server.native.gemm.plans import dtype_name

COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}
GEMM_SIZE = {"cpu": 2048, "cuda": 8192}
NUM_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Ceilings:
    """`gemm` names the type that was multiplied."""

    copy_bytes_per_s: float
    gemm_flops_per_s: float
    gemm: str

    def of_devices(self, count: int) -> Ceilings:
        """What so many such devices could do together."""
        return Ceilings(count * self.copy_bytes_per_s, count * self.gemm_flops_per_s, self.gemm)


@torch.inference_mode()
def measure_ceilings(device: str, dtype: torch.dtype, *, quantization: str) -> Ceilings:
    """Medians of a few rounds; a copy counts what it reads and what it writes."""
    kind = torch.device(device).type
    copy_bytes_per_s = _copy_bytes_per_s(device, COPY_BYTES.get(kind, COPY_BYTES["cpu"]))
    size = GEMM_SIZE.get(kind, GEMM_SIZE["cpu"])
    is_fp8 = quantization.startswith("fp8") and kind == "cuda"
    gemm_s = _median_s(_fp8_gemm(size, device) if is_fp8 else _plain_gemm(size, device, dtype), kind)
    name = "float8_e4m3fn" if is_fp8 else dtype_name(dtype)
    return Ceilings(copy_bytes_per_s, 2 * size**3 / gemm_s, name)


def _copy_bytes_per_s(device: str, num_bytes: int) -> float:
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / _median_s(lambda: target.copy_(source), torch.device(device).type)


def _plain_gemm(size: int, device: str, dtype: torch.dtype) -> Callable[[], object]:
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return lambda: left @ right


def _fp8_gemm(size: int, device: str) -> Callable[[], object]:
    left, right = (torch.randn(size, size, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    scale = torch.ones((), device=device)
    return lambda: torch._scaled_mm(
        left, right.t(), scale_a=scale, scale_b=scale, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def _median_s(work: Callable[[], object], kind: str) -> float:
    num_calls = 10 if kind == "cuda" else 1
    _timed_s(work, kind, 1)
    return median(_timed_s(work, kind, num_calls) / num_calls for _ in range(NUM_ROUNDS))


def _timed_s(work: Callable[[], object], kind: str, num_calls: int) -> float:
    if kind == "cuda":
        torch.cuda.synchronize()
    start_s = time.perf_counter()
    for _ in range(num_calls):
        work()
    if kind == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start_s
