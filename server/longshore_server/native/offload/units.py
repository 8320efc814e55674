"""Blocks of the KV cache as units of bytes and back: all layers' keys and values of a block in one piece."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from longshore_server.native.attention.kv_cache import PagedKVCache, as_bytes


def unit_bytes(cache: PagedKVCache) -> int:
    return sum(store[:, 0].nbytes for store in cache.stores)


def read_units(cache: PagedKVCache, blocks: Sequence[int]) -> torch.Tensor:
    """[blocks, unit_bytes] uint8 on the cache's device, a copy."""
    index = torch.tensor(blocks, device=cache.device)
    parts = [
        as_bytes(store).index_select(1, index).transpose(0, 1).reshape(len(blocks), -1).view(torch.uint8)
        for store in cache.stores
    ]
    return torch.cat(parts, dim=1)


def write_units(cache: PagedKVCache, blocks: Sequence[int], units: torch.Tensor) -> None:
    """Fills blocks from [blocks, unit_bytes] on the cache's device."""
    index = torch.tensor(blocks, device=cache.device)
    start = 0
    for store in cache.stores:
        num_bytes = store[:, 0].nbytes
        target = as_bytes(store)
        part = units[:, start : start + num_bytes].contiguous().view(target.dtype)
        shape = (len(blocks), store.shape[0], *store.shape[2:])
        target.index_copy_(1, index, part.view(shape).transpose(0, 1))
        start += num_bytes
