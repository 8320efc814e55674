"""Copies between one KV cache and the memories beside it, on a stream of their own on a GPU.

It knows blocks and units; which of them belong together is decided elsewhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch

from longshore_server.native.attention.kv_cache import PagedKVCache
from longshore_server.native.attention.page_bounds import PageBounds
from longshore_server.native.offload.units import read_units, unit_bytes, write_units

MAX_STAGING_BYTES = 256 << 20

_Item = TypeVar("_Item")


class BlockCopies:
    """Blocks out and in through staging memory; `stream` is the side stream, None on a CPU."""

    def __init__(self, cache: PagedKVCache, bounds: PageBounds | None = None) -> None:
        self._cache, self._bounds = cache, bounds
        self._unit_bytes = unit_bytes(cache)
        self.stream = torch.cuda.Stream(cache.device) if cache.device.type == "cuda" else None

    def pieces(self, planned: Sequence[_Item]) -> Iterator[Sequence[_Item]]:
        """What fits the staging memory at a time; each piece's copies end before the next one's begin."""
        size = max(1, MAX_STAGING_BYTES // self._unit_bytes)
        for start in range(0, len(planned), size):
            if start:
                self.wait()
            yield planned[start : start + size]

    @contextlib.contextmanager
    def taken_out(self, blocks: Sequence[int]) -> Iterator[torch.Tensor]:
        """[blocks, unit_bytes], a staging copy, so that the blocks are free while what is done with it inside
        runs beside the step.
        """
        if blocks:
            units = read_units(self._cache, blocks)
        else:
            units = torch.empty(0, self._unit_bytes, dtype=torch.uint8, device=self._cache.device)
        with self._beside(units):
            yield units

    def bring_in(self, blocks: Sequence[int], units: Sequence[torch.Tensor]) -> None:
        """Fills blocks before whatever the main stream is given next."""
        shape = (len(blocks), self._unit_bytes)
        staged = torch.empty(shape, dtype=torch.uint8, device=self._cache.device)
        with self._beside(staged):
            for place, unit in zip(staged, units, strict=True):
                place.copy_(unit, non_blocking=True)
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)
        write_units(self._cache, blocks, staged)
        if self._bounds is not None:
            self._bounds.update_all(torch.tensor(blocks, device=self._cache.device))

    def wait(self) -> None:
        """Until all copies of the side stream have ended."""
        if self.stream is not None:
            self.stream.synchronize()

    @contextlib.contextmanager
    def _beside(self, units: torch.Tensor) -> Iterator[None]:
        """The side stream, after what the main one has been given so far; nothing special on a CPU."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        units.record_stream(self.stream)
        with torch.cuda.stream(self.stream):
            yield
