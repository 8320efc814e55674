"""Few rows through the products of Llama's layers: PYTHONPATH=server:sdk_python python3 FILE [options].

The library's products and our own kernels' stand in the chain of kernels that they have in a step, without
attention, captured, over more weights than the L2 cache holds. A chip that reads at full speed reaches its
power limit within a second, so each way is timed twice: for some 40 replays on a cool chip, and for a second
after half a second of itself.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from longshore_server.native.gemm.cublaslt import cublaslt_of
from longshore_server.native.gemm.multiply import Gemm, GpuGemm
from longshore_server.native.gemm.plans import find_plans
from longshore_server.native.model.fp8 import Fp8Rows, ScaledOutput
from longshore_server.native.model.fused_ops import (
    Rows,
    add_rms_norm,
    quantize_rows,
    rotary_angles,
    silu_mul,
    split_qkv,
)

HEAD_DIM, NUM_KV_HEADS = 128, 8
NUM_LAYERS = 4  # 3.4 GB of FP8, 1.7 GB of bf16
EPS = 1e-5
COOL_REPLAYS = 40
WARM_S, TIMED_S, COOLING_S = 0.5, 1.0, 3.0
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Shape:
    hidden: int
    inner: int
    num_heads: int
    is_fp8: bool


SHAPES = {"llama-8b": Shape(4096, 14336, 32, False), "llama-70b": Shape(8192, 28672, 64, True)}


class Layer:
    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        hidden, inner = shape.hidden, shape.inner
        num_qkv = (shape.num_heads + 2 * NUM_KV_HEADS) * HEAD_DIM
        self.qkv, self.output = self._draw(num_qkv, hidden), self._draw(hidden, shape.num_heads * HEAD_DIM)
        self.gate_up, self.down = self._draw(2 * inner, hidden), self._draw(hidden, inner)
        self.norm = torch.ones(hidden, dtype=DTYPE, device="cuda")

    def _draw(self, height: int, width: int) -> Rows:
        drawn = torch.empty(height, width, dtype=DTYPE, device="cuda").normal_(std=0.02)
        return quantize_rows(drawn) if self._shape.is_fp8 else drawn

    def run(
        self, x: ScaledOutput, residual: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor], gemm: Gemm
    ) -> tuple[ScaledOutput, torch.Tensor]:
        """The queries stand in for what was attended."""
        is_fp8 = self._shape.is_fp8
        rows, residual = add_rms_norm(x, residual, self.norm, EPS, is_fp8)
        qkv = _product(rows, self.qkv, gemm)
        queries, _, _ = split_qkv(qkv, *angles, self._shape.num_heads, NUM_KV_HEADS, None)
        attended = queries.flatten(1)
        rows = quantize_rows(attended) if is_fp8 else attended
        rows, residual = add_rms_norm(_product(rows, self.output, gemm), residual, self.norm, EPS, is_fp8)
        active = silu_mul(_product(rows, self.gate_up, gemm), DTYPE, is_fp8)
        return _product(active, self.down, gemm), residual


def _product(rows: Rows, weight: Rows, gemm: Gemm) -> ScaledOutput:
    if isinstance(rows, Fp8Rows) and isinstance(weight, Fp8Rows):
        values = gemm(rows.values, weight.values, None, DTYPE, may_split=True)
        return ScaledOutput(values, rows.scales, weight.scales)
    assert isinstance(rows, torch.Tensor) and isinstance(weight, torch.Tensor)
    return ScaledOutput(gemm(rows, weight, None, DTYPE, may_split=True))


def capture(layers: list[Layer], shape: Shape, num_rows: int, gemm: Gemm) -> torch.cuda.CUDAGraph:
    row = torch.randn(num_rows, shape.hidden, dtype=DTYPE, device="cuda")
    positions = torch.arange(num_rows, device="cuda")
    angles = rotary_angles(positions, torch.rand(HEAD_DIM // 2, device="cuda"), 1.0, DTYPE)

    def run() -> None:
        x, residual = ScaledOutput(row), row
        for layer in layers:
            x, residual = layer.run(x, residual, angles, gemm)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def replay_us(graph: torch.cuda.CUDAGraph, num_replays: int) -> float:
    """Microseconds of one layer."""
    began_s = time.perf_counter()
    for _ in range(num_replays):
        graph.replay()
    torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - began_s) / num_replays / NUM_LAYERS


class EnergyMeter:
    """Joules that the first GPU has taken, by NVML, which updates them some ten times a second."""

    def __init__(self) -> None:
        self._nvml = ctypes.CDLL("libnvidia-ml.so.1")
        self._device = ctypes.c_void_p()
        self._check(self._nvml.nvmlInit_v2())
        self._check(self._nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(self._device)))

    def read_j(self) -> float:
        millijoules = ctypes.c_ulonglong()
        self._check(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._device, ctypes.byref(millijoules)))
        return millijoules.value / 1e3

    @staticmethod
    def _check(status: int) -> None:
        if status:
            raise RuntimeError(f"NVML gave status {status}")


def main() -> None:
    parser = argparse.ArgumentParser(description="The library's products and our own, beside each other.")
    parser.add_argument("--model", choices=SHAPES, default="llama-70b")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    arguments = parser.parse_args()
    meter, shape = EnergyMeter(), SHAPES[arguments.model]
    lt = cublaslt_of(torch.device("cuda", torch.cuda.current_device()))
    tables = find_plans(torch.cuda.get_device_name(), lt.version, Path())
    own = GpuGemm(lt, tables)
    gemms: dict[str, Gemm] = {
        "library": lambda rows, weight, bias, dtype, may_split=False: own.multiply_by_library(
            rows, weight, bias, dtype
        ),
        "own": own,
    }
    with torch.inference_mode():
        layers = [Layer(shape) for _ in range(NUM_LAYERS)]
        for num_rows in arguments.rows:
            graphs = {way: capture(layers, shape, num_rows, gemm) for way, gemm in gemms.items()}
            for way, graph in (*graphs.items(), *reversed(graphs.items())):
                time.sleep(COOLING_S)
                replay_us(graph, 5)
                cool_us = replay_us(graph, COOL_REPLAYS)
                for_a_second = int(1e6 / cool_us / NUM_LAYERS)
                replay_us(graph, int(WARM_S * for_a_second))
                before_j, began_s = meter.read_j(), time.perf_counter()
                warm_us = replay_us(graph, int(TIMED_S * for_a_second))
                power_w = (meter.read_j() - before_j) / (time.perf_counter() - began_s)
                words = f"cool {cool_us:.1f} us, sustained {warm_us:.1f} us at {power_w:.0f} W"
                print(f"{arguments.model}, {num_rows} rows, {way}: a layer {words}", flush=True)


if __name__ == "__main__":
    main()
