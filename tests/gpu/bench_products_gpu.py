"""A prompt's FP8 products by what their operands hold: PYTHONPATH=server:sdk_python python3 FILE.

A chip at its power limit multiplies zeros faster than numbers. With random weights "the same work" therefore
depends on how they are drawn. Three draws of one Llama-70B layer, each product 80 times for 4,096 rows:

  model     weights as the model initializes them, as `load_format = "random"` does
  uniform   every weight, the norms' too, from +-0.001, as vLLM's load format `dummy` draws them
  limited   the same, with vLLM's least scale of 1 / (448 * 512) for a row in FP8, which the down product's
            input is far below

First it computes what share of each product's input is zero then, from the definition, at the layer's widths.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from statistics import median

import torch
from torch.nn.functional import silu

from longshore_server.native.gemm.multiply import multiply_by_torch
from longshore_server.native.model.fp8 import FP8_DTYPE, FP8_MAX, Fp8Rows, ScaledOutput, quantize_rows

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, NUM_LAYERS = 8192, 28672, 64, 8, 128, 80
PROMPT_ROWS, SAMPLE_ROWS = 4096, 16
LEAST_SCALE = 1 / (FP8_MAX * 512)
EPS = 1e-5


@dataclass(frozen=True)
class Draw:
    name: str
    is_uniform: bool
    least_scale: float = 0.0

    def weight(self, *shape: int, device: str) -> torch.Tensor:
        drawn = torch.empty(*shape, device=device, dtype=torch.bfloat16)
        return drawn.uniform_(-1e-3, 1e-3) if self.is_uniform else drawn.normal_(std=0.02)

    def norm_weight(self, width: int, device: str) -> torch.Tensor:
        return self.weight(width, device=device) if self.is_uniform else torch.ones(width, device=device)

    def quantize(self, rows: torch.Tensor) -> Fp8Rows:
        if not self.least_scale:
            return quantize_rows(rows)
        scales = (rows.float().abs().amax(-1) / FP8_MAX).clamp_min(self.least_scale)
        return Fp8Rows((rows.float() / scales[:, None]).to(FP8_DTYPE), scales)


DRAWS = [Draw("model", False), Draw("uniform", True), Draw("limited", True, LEAST_SCALE)]


class Layer:
    """One layer's weights in FP8, and the inputs of its four products for the first token of a context."""

    def __init__(self, draw: Draw, num_rows: int, shrink: int, device: str) -> None:
        hidden, inner = HIDDEN // shrink, INNER // shrink
        heads, kv_heads = max(1, HEADS // shrink), max(1, KV_HEADS // shrink)
        head_dim = hidden // heads
        shapes = {
            "qkv": ((heads + 2 * kv_heads) * head_dim, hidden),
            "o": (hidden, heads * head_dim),
            "gate_up": (2 * inner, hidden),
            "down": (hidden, inner),
        }
        self.weights = {
            name: quantize_rows(draw.weight(*shape, device=device)) for name, shape in shapes.items()
        }
        residual = draw.weight(num_rows, hidden, device=device)
        self.inputs = {"qkv": draw.quantize(self._normed(residual, draw))}
        value = self.product("qkv")[:, (heads + kv_heads) * head_dim :].view(num_rows, kv_heads, head_dim)
        attended = value.repeat_interleave(heads // kv_heads, 1).flatten(1)  # of a context of one token
        self.inputs["o"] = draw.quantize(attended)
        residual = residual + self.product("o")
        self.inputs["gate_up"] = draw.quantize(self._normed(residual, draw))
        gate, up = self.product("gate_up").chunk(2, dim=-1)
        self.inputs["down"] = draw.quantize(silu(gate) * up)

    @staticmethod
    def _normed(rows: torch.Tensor, draw: Draw) -> torch.Tensor:
        floats = rows.float()
        normed = floats * torch.rsqrt(floats.pow(2).mean(-1, keepdim=True) + EPS)
        return (draw.norm_weight(rows.shape[1], str(rows.device)) * normed).bfloat16()

    def product(self, name: str) -> torch.Tensor:
        rows, weight = self.inputs[name], self.weights[name]
        values = multiply_by_torch(rows.values, weight.values, None, torch.bfloat16)
        return ScaledOutput(values, rows.scales, weight.scales).resolve(torch.bfloat16)

    def run(self) -> None:
        for name, rows in self.inputs.items():
            multiply_by_torch(rows.values, self.weights[name].values, None, torch.bfloat16)

    @property
    def num_flops(self) -> int:
        return sum(2 * len(self.inputs[name].values) * w.values.numel() for name, w in self.weights.items())


def zero_shares(draw: Draw, shrink: int, device: str) -> dict[str, float]:
    layer = Layer(draw, SAMPLE_ROWS, shrink, device)
    return {name: float((rows.values.float() == 0).float().mean()) for name, rows in layer.inputs.items()}


def prompt_ms(layer: Layer) -> float:
    torch.cuda.synchronize()
    start_s = time.perf_counter()
    for _ in range(NUM_LAYERS):
        layer.run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start_s) * 1e3


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shrink", type=int, default=1, help="divides the layer's widths")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=5, help="of one draw, one after the other in a round")
    args = parser.parse_args()
    torch.manual_seed(0)
    for draw in DRAWS:
        shares = zero_shares(draw, args.shrink, args.device)
        print(
            f"{draw.name:8} zeros: " + ", ".join(f"{n} {100 * s:.2f}%" for n, s in shares.items()), flush=True
        )
    if args.device == "cpu":
        return
    layers = {draw.name: Layer(draw, PROMPT_ROWS, args.shrink, args.device) for draw in DRAWS}
    times: dict[str, list[float]] = {name: [] for name in layers}
    for _ in range(args.rounds):
        for name, layer in layers.items():  # in turns, so that all are measured on an equally warm chip
            times[name] += [prompt_ms(layer) for _ in range(args.prompts)][1:]
    for name, layer in layers.items():
        ms = median(times[name])
        rate = NUM_LAYERS * layer.num_flops / ms / 1e9
        print(f"{name:8} {ms:8.1f} ms for {NUM_LAYERS} layers, {rate:,.0f} TFLOP/s")


if __name__ == "__main__":
    main()
