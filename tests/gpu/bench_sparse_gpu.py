"""Decode attention against context, dense and sparse: PYTHONPATH=server:sdk_python:tests python3 FILE.

One layer of Llama-70B's shape (8 KV heads of 128, 8 query heads each), bf16, pages of 16 tokens anywhere in
the cache. A sparse time holds the picking of the pages. Dense and sparse attend by the same kernel: on a GPU
the Triton one, as a captured graph, elsewhere torch's over gathered pages. Sparse over everything is checked
against dense first.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch

from longshore_server.native.attention.interface import DecodeRows, PickedPages
from longshore_server.native.attention.kv_cache import LayerGeometry, PagedKVCache
from longshore_server.native.attention.page_bounds import PageBounds
from longshore_server.native.attention.sparse import (
    SparseRows,
    attend_slots,
    best_pages,
    pick_pages,
    slot_tables,
)
from longshore_server.native.attention.sparsity import Sparsity

PAGE, KEY_DIM = 16, 128
ALWAYS: dict[str, Any] = {"dense_layers": frozenset(), "dense_below_tokens": 0}
SPARSITIES = {
    "window": Sparsity(window_tokens=1024, sink_tokens=64, **ALWAYS),
    "top pages": Sparsity(window_tokens=512, sink_tokens=64, top_pages=64, **ALWAYS),
}


class Bench:
    """`num_rows` sequences of one context length over one layer's cache, attended in torch."""

    kernel = "torch"

    def __init__(self, context: int, num_rows: int, num_heads: int, num_kv_heads: int, device: str) -> None:
        self.device, self.scale = torch.device(device), KEY_DIM**-0.5
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        num_pages = -(-context // PAGE)
        geometry = LayerGeometry(num_kv_heads, KEY_DIM, KEY_DIM)
        self.cache = PagedKVCache([geometry], num_pages * num_rows, PAGE, dtype, self.device)
        self.cache.keys[0].normal_()
        self.cache.values[0].normal_()
        self.bounds = PageBounds(self.cache, [0])
        for blocks in torch.arange(num_pages * num_rows, device=self.device).split(4096):
            self.bounds.update(0, blocks)
        tables = torch.randperm(num_pages * num_rows, device=self.device).view(num_rows, num_pages)
        lens = torch.full((num_rows,), context, device=self.device)
        self.rows = SparseRows(torch.arange(num_rows, device=self.device), lens, tables)
        self.query = torch.randn(num_rows, num_heads, KEY_DIM, dtype=dtype, device=self.device)

    def dense(self) -> torch.Tensor:
        everything = torch.arange(self.rows.tables.shape[1], device=self.device)
        return self._attend(everything.expand(len(self.query), 1, -1))

    def sparse(self, sparsity: Sparsity) -> torch.Tensor:
        if sparsity.top_pages:
            picks = pick_pages(0, self.query, self.rows, sparsity, self.bounds, PAGE, self.scale)
        else:
            scores = torch.zeros(len(self.query), 1, self.rows.tables.shape[1], device=self.device)
            picks = best_pages(scores, self.rows, sparsity, PAGE)
        return self._attend(picks)

    def _attend(self, picks: torch.Tensor) -> torch.Tensor:
        slots, lens = slot_tables(picks, self.rows, PAGE, self.cache.keys[0].shape[2])
        return attend_slots(self.query, self.cache, 0, slots, lens, self.scale)


class TritonBench(Bench):
    """The same on a GPU, as the engine attends there."""

    kernel = "triton"

    def dense(self) -> torch.Tensor:
        return self._attend_pages(None)

    def sparse(self, sparsity: Sparsity) -> torch.Tensor:
        from longshore_server.native.attention.triton_pages import PagePicker

        rows, lens = self.rows.rows, self.rows.context_lens
        picker = PagePicker(sparsity, self.bounds)
        decodes = DecodeRows(rows, lens, torch.zeros_like(lens))
        return self._attend_pages(picker.pick(0, self.query, self._tables, decodes, self.scale, None))

    def _attend_pages(self, picked: PickedPages | None) -> torch.Tensor:
        from longshore_server.native.attention.triton_decode import decode_attention

        cache, output = self.cache, torch.empty_like(self.query)
        decode_attention(
            self.query,
            cache.keys[0],
            cache.values[0],
            self._tables,
            self.rows.rows,
            self.rows.context_lens,
            cache.scales[0],
            self.scale,
            None,
            output,
            picked=picked,
        )
        return output

    @cached_property
    def _tables(self) -> torch.Tensor:
        return self.rows.tables.to(torch.int32)


def milliseconds(call: Callable[[], object], device: torch.device, budget_s: float) -> float:
    """The median of as many runs as fit `budget_s`, three at least."""
    for _ in range(2):
        call()
    times: list[float] = []
    end_s = time.perf_counter() + budget_s
    while len(times) < 3 or (time.perf_counter() < end_s and len(times) < 200):
        if device.type == "cuda":
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            stop.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(stop))
        else:
            start_s = time.process_time()
            call()
            times.append((time.process_time() - start_s) * 1e3)
    return sorted(times)[len(times) // 2]


def graphed(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The call as a CUDA graph, so that launches do not count, as they do not in the engine."""
    if device.type != "cuda":
        return call
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


@torch.inference_mode()
def measure(context: int, args: argparse.Namespace) -> dict[str, object]:
    make = TritonBench if args.device.startswith("cuda") else Bench
    bench = make(context, args.rows, args.heads, args.kv_heads, args.device)
    everything = Sparsity(window_tokens=context, sink_tokens=0, **ALWAYS)
    difference = (bench.sparse(everything) - bench.dense()).abs().max().item()
    assert difference < 2e-2, f"sparse over everything differs from dense by {difference}"
    calls: dict[str, Callable[[], object]] = {"dense": bench.dense}
    calls |= {name: partial(bench.sparse, sparsity) for name, sparsity in SPARSITIES.items()}
    times = {
        name: milliseconds(graphed(call, bench.device), bench.device, args.budget_s)
        for name, call in calls.items()
    }
    return {"context": context, "kernel": bench.kernel, **times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 8192, 16384, 32768, 65536, 131072])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--budget-s", type=float, default=0.2, help="time for each figure")
    args = parser.parse_args()
    torch.set_num_threads(1)  # CPU time of one thread, where there is no GPU
    print(
        f"{'context':>8} {'kernel':>7} {'dense ms':>10}"
        + "".join(f"{n + ' ms':>14}{'x':>6}" for n in SPARSITIES)
    )
    for context in args.contexts:
        row = measure(context, args)
        line = f"{context:8} {row['kernel']:>7} {row['dense']:10.3f}"
        print(line + "".join(f"{row[n]:14.3f}{row['dense'] / row[n]:6.1f}" for n in SPARSITIES), flush=True)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
