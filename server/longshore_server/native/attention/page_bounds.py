"""The least and the greatest of each key channel in every page: what a page's keys can score at most.

A page's bounds are a function of its keys alone, so writing them again changes nothing, and a page that comes
back from elsewhere gets the bounds it had. They are right for full pages, which are the only ones ranked.
Source: Quest, arXiv 2406.10774.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from longshore_server.native.attention.kv_cache import LayerGeometry, PagedKVCache, as_bytes


class PageBounds:
    """`lowest[layer]` and `highest[layer]` are [blocks, num_kv_heads, key_dim] for each layer in `layers`.

    They are of the numbers as they are stored: an FP8 cache's scales are positive, and come in with scores.
    """

    def __init__(self, cache: PagedKVCache, layers: Collection[int]) -> None:
        self.cache = cache
        self.lowest: dict[int, torch.Tensor] = {}
        self.highest: dict[int, torch.Tensor] = {}
        dtype = _bounds_dtype(cache.dtype)
        for layer in sorted(layers):
            blocks, _, num_kv_heads, key_dim = cache.keys[layer].shape
            for bounds in (self.lowest, self.highest):
                bounds[layer] = torch.zeros(blocks, num_kv_heads, key_dim, dtype=dtype, device=cache.device)

    def update(self, layer: int, blocks: torch.Tensor) -> None:
        """Takes in the keys of `blocks` [n] as they stand in the cache now."""
        if layer not in self.lowest:
            return
        lowest, pages = self.lowest[layer], self.cache.keys[layer]
        keys = as_bytes(pages).index_select(0, blocks).view(pages.dtype).to(lowest.dtype)
        lowest.index_copy_(0, blocks, keys.amin(1))
        self.highest[layer].index_copy_(0, blocks, keys.amax(1))

    def update_all(self, blocks: torch.Tensor) -> None:
        """Takes in the keys of `blocks` in every layer, after they were filled from outside the model."""
        for layer in self.lowest:
            self.update(layer, blocks)

    def scores(self, layer: int, query: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
        """The most that any key of each page can score: [rows, num_kv_heads, group, pages].

        `query` is [rows, num_heads, key_dim], `tables` [rows, pages] names each row's blocks.
        """
        lowest, highest = self.lowest[layer], self.highest[layer]
        num_rows, _, key_dim = query.shape
        num_kv_heads = lowest.shape[1]
        grouped = query.view(num_rows, num_kv_heads, -1, key_dim)
        low, high = (
            bounds.index_select(0, tables.flatten())
            .view(num_rows, -1, num_kv_heads, key_dim)
            .permute(0, 2, 3, 1)
            .to(query.dtype)
            for bounds in (lowest, highest)
        )
        scores = (grouped.clamp(min=0) @ high + grouped.clamp(max=0) @ low).float()
        is_fp8 = self.cache.dtype.itemsize == 1
        return scores * self.cache.scales[layer].key[:, None, None] if is_fp8 else scores


def bounds_bytes(geometries: Sequence[LayerGeometry], layers: Collection[int], dtype: torch.dtype) -> int:
    """Bytes of one block's bounds over `layers`, of a cache in `dtype`."""
    num_elements = sum(geometries[layer].num_kv_heads * geometries[layer].key_dim for layer in layers)
    return 2 * num_elements * _bounds_dtype(dtype).itemsize


def _bounds_dtype(cache_dtype: torch.dtype) -> torch.dtype:
    return cache_dtype if cache_dtype.itemsize > 1 else torch.bfloat16
