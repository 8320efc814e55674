"""The torch reference over a KV cache in FP8: what the Triton kernels round, rounded on any device.

Keys and values are stored divided by their layer's scales. A step's pages are read into numbers of the
model's own type and attended there by the reference's passes; whole prompts attend their own unrounded rows,
as they do on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from longshore_server.native.attention.kv_cache import PagedKVCache, as_bytes, from_fp8, to_fp8
from longshore_server.native.attention.layout import BatchLayout, Span
from longshore_server.native.attention.reference import AttentionPass, Planner, run_passes


@dataclass(frozen=True, slots=True)
class _StepPages:
    """As much of a cache as planning passes reads, for the pages of one step alone."""

    block_size: int
    padding_block: int
    dtype: torch.dtype
    device: torch.device
    key_token_bytes: int


class Fp8Context:
    """An attention context over a PagedKVCache in FP8 for one step."""

    def __init__(self, cache: PagedKVCache, layout: BatchLayout, plan: Planner) -> None:
        self.cache = cache
        self._plan = plan
        self._slots = torch.tensor(layout.slots(), device=cache.device)
        blocks = {b: None for span in (*layout.decodes, *layout.prefills) for b in _used(span, layout)}
        places = {block: place for place, block in enumerate(blocks)}
        self._blocks = torch.tensor([*blocks, cache.padding_block], device=cache.device)
        moved = [
            [replace(span, block_table=[places[b] for b in _used(span, layout)]) for span in spans]
            for spans in (layout.decodes, layout.prefills)
        ]
        self._layout = BatchLayout(moved[0], moved[1], layout.block_size)
        self._passes: dict[int | None, list[AttentionPass]] = {}

    def check_arguments(self, arguments: dict[str, Any], attention_mask: torch.Tensor | None) -> None:
        """Nothing to check: the probe has seen this model's arguments."""

    def attend(
        self,
        layer_index: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        """Writes the rows' keys and values, then attends; shapes as in AttentionContext."""
        self.write(layer_index, key, value)
        return self.attend_written(layer_index, query, key, value, scale, window)

    def write(self, layer_index: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Puts the rows' keys and values into their places in the cache, rounded."""
        cache, scales = self.cache, self.cache.scales[layer_index]
        self._write(cache.keys[layer_index], key, scales.key)
        self._write(cache.values[layer_index], value, scales.value)

    def attend_written(
        self,
        layer_index: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        """Attends the layout's rows; whatever rows it lacks have no meaning in the output."""
        cache, scales = self.cache, self.cache.scales[layer_index]
        key_pages = self._read(cache.keys[layer_index], scales.key, key.dtype)
        value_pages = self._read(cache.values[layer_index], scales.value, value.dtype)
        passes = self._passes_of(window, key_pages)
        return run_passes(passes, query, key, value, key_pages, value_pages, scale)

    def _write(self, pages: torch.Tensor, rows: torch.Tensor, scale: torch.Tensor) -> None:
        as_bytes(pages).flatten(0, 1).index_copy_(0, self._slots, as_bytes(to_fp8(rows, scale)))

    def _read(self, pages: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """This step's pages, and one of zeros behind them."""
        stored = as_bytes(pages).index_select(0, self._blocks).view(pages.dtype)
        return from_fp8(stored, scale, dtype)

    def _passes_of(self, window: int | None, key_pages: torch.Tensor) -> list[AttentionPass]:
        if window not in self._passes:
            pages = _StepPages(
                self._layout.block_size,
                len(key_pages) - 1,
                key_pages.dtype,
                key_pages.device,
                key_pages[0, 0].nbytes,
            )
            self._passes[window] = self._plan(self._layout, window, cast(PagedKVCache, pages))
        return self._passes[window]


def _used(span: Span, layout: BatchLayout) -> list[int]:
    """The blocks that hold the span's context."""
    return list(span.block_table[: -(-span.context_len // layout.block_size)])
