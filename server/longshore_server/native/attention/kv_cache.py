"""The KV cache's memory: one tensor of blocks per layer geometry. It knows shapes, not who owns a block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

FP8_MAX = 448.0  # largest finite e4m3


@dataclass(frozen=True, slots=True)
class LayerGeometry:
    """Shape of what one layer caches for one token."""

    num_kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def num_elements(self) -> int:
        return self.num_kv_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True, slots=True)
class KVScales:
    """What an FP8 cache's stored numbers are multiplied by: float32 [num_kv_heads] each, of one layer."""

    key: torch.Tensor
    value: torch.Tensor


@dataclass(frozen=True, slots=True)
class KVTarget:
    """Where a kernel puts one layer's keys and values: pages [blocks, block_size, num_kv_heads, dim]."""

    keys: torch.Tensor
    values: torch.Tensor
    scales: KVScales
    slots: torch.Tensor  # [tokens] int64, negative for none


class PagedKVCache:
    """`num_blocks` blocks, and one more that stays zero and pads block tables (`padding_block`).

    `keys[layer]` is [num_blocks + 1, block_size, num_kv_heads, key_dim], `values[layer]` likewise.
    """

    def __init__(
        self,
        geometries: Sequence[LayerGeometry],
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.padding_block = num_blocks
        self.dtype = dtype
        self.device = device
        self.keys: list[torch.Tensor] = [torch.empty(0)] * len(geometries)
        self.values: list[torch.Tensor] = [torch.empty(0)] * len(geometries)
        self.scales = [_unit_scales(geometry, device) for geometry in geometries]
        self._stores: list[torch.Tensor] = []  # [layers, num_blocks + 1, ...], blocks on dimension 1
        for geometry in dict.fromkeys(geometries):
            layers = [index for index, other in enumerate(geometries) if other == geometry]
            shape = (len(layers), num_blocks + 1, block_size, geometry.num_kv_heads)
            keys = torch.zeros(*shape, geometry.key_dim, dtype=dtype, device=device)
            values = torch.zeros(*shape, geometry.value_dim, dtype=dtype, device=device)
            self._stores += [keys, values]
            for position, layer in enumerate(layers):
                self.keys[layer], self.values[layer] = keys[position], values[position]

    @property
    def stores(self) -> Sequence[torch.Tensor]:
        """All of the memory: keys or values of layers with one shape, blocks on dimension 1."""
        return self._stores

    @property
    def key_token_bytes(self) -> int:
        """Bytes of one token's key in the first layer."""
        return self.keys[0][0, 0].nbytes

    def clear_blocks(self, blocks: Sequence[int]) -> None:
        """Zeroes blocks for a new owner, who reads past its end through a mask: stale NaN outlives -inf."""
        if not blocks:
            return
        index = torch.tensor(blocks, device=self._stores[0].device)
        for store in self._stores:
            as_bytes(store).index_fill_(1, index, 0)


def as_bytes(pages: torch.Tensor) -> torch.Tensor:
    """The same memory in a type that every device can index: torch cannot index-copy all of the FP8 ones."""
    return pages.view(torch.uint8) if pages.dtype.itemsize == 1 else pages


def to_fp8(rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """[..., heads, dim] divided by its heads' scales [heads], cut off at the largest number, rounded."""
    return (rows.float() / scale[:, None]).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def from_fp8(stored: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (stored.float() * scale[:, None]).to(dtype)


def block_bytes(geometries: Sequence[LayerGeometry], block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers."""
    return block_size * dtype.itemsize * sum(geometry.num_elements for geometry in geometries)


def _unit_scales(geometry: LayerGeometry, device: torch.device) -> KVScales:
    ones = torch.ones(geometry.num_kv_heads, dtype=torch.float32, device=device)
    return KVScales(ones, ones.clone())
