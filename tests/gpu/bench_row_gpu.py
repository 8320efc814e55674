"""One row through the products of a Llama-70B layer in FP8: PYTHONPATH=server:sdk_python python3 FILE.

The library's products and our row kernel's stand in the chain of kernels that they have in a step, captured,
over more weights than the L2 cache holds. A chip that reads at full speed reaches its power limit within a
second, so each way is timed twice: for some 40 ms on a cool chip, and for a second after half a second of
itself.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable

import torch

from longshore_server.native.gemm import triton_gemv
from longshore_server.native.gemm.multiply import multiply_by_torch
from longshore_server.native.model.fp8 import Fp8Rows, ScaledOutput
from longshore_server.native.model.fused_ops import add_rms_norm, quantize_rows, silu_mul

HIDDEN, INNER, NUM_QKV = 8192, 28672, 10240
NUM_LAYERS = 4  # 3.4 GB
EPS = 1e-5
COOL_REPLAYS = 40
WARM_S, TIMED_S, COOLING_S = 0.5, 1.0, 3.0

Multiply = Callable[[torch.Tensor, torch.Tensor, None, torch.dtype], torch.Tensor]
WAYS: dict[str, Multiply] = {"library": multiply_by_torch, "row kernel": triton_gemv.multiply_row}


class Layer:
    def __init__(self) -> None:
        self.qkv, self.output = self._draw(NUM_QKV, HIDDEN), self._draw(HIDDEN, HIDDEN)
        self.gate_up, self.down = self._draw(2 * INNER, HIDDEN), self._draw(HIDDEN, INNER)
        self.norm = torch.ones(HIDDEN, dtype=torch.bfloat16, device="cuda")

    @staticmethod
    def _draw(height: int, width: int) -> Fp8Rows:
        drawn = torch.empty(height, width, dtype=torch.bfloat16, device="cuda").normal_(std=0.02)
        return quantize_rows(drawn)

    def run(
        self, x: ScaledOutput, residual: torch.Tensor, multiply: Multiply
    ) -> tuple[ScaledOutput, torch.Tensor]:
        """Without rotation and attention: a part of the qkv product stands in for what was attended."""
        rows, residual = add_rms_norm(x, residual, self.norm, EPS, True)
        attended = quantize_rows(_product(rows, self.qkv, multiply).values[:, :HIDDEN])
        rows, residual = add_rms_norm(
            _product(attended, self.output, multiply), residual, self.norm, EPS, True
        )
        active = silu_mul(_product(rows, self.gate_up, multiply), torch.bfloat16, True)
        return _product(active, self.down, multiply), residual


def _product(rows: Fp8Rows | torch.Tensor, weight: Fp8Rows, multiply: Multiply) -> ScaledOutput:
    assert isinstance(rows, Fp8Rows)
    values = multiply(rows.values, weight.values, None, torch.bfloat16)
    return ScaledOutput(values, rows.scales, weight.scales)


def capture(layers: list[Layer], multiply: Multiply) -> torch.cuda.CUDAGraph:
    row = torch.randn(1, HIDDEN, dtype=torch.bfloat16, device="cuda")

    def run() -> None:
        x, residual = ScaledOutput(row), row
        for layer in layers:
            x, residual = layer.run(x, residual, multiply)

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
    meter = EnergyMeter()
    with torch.inference_mode():
        layers = [Layer() for _ in range(NUM_LAYERS)]
        graphs = {way: capture(layers, multiply) for way, multiply in WAYS.items()}
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
            print(f"{way}: a layer {words}", flush=True)


if __name__ == "__main__":
    main()
