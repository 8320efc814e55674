"""A tier's memory: numbered places for units of one size. It knows nothing of keys or of what is old.

A unit is one KV block over all layers, as bytes.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from itertools import accumulate
from typing import Protocol

import torch

from longshore_server.native.errors import ConfigError
from longshore_server.native.offload.spec import FIELD


class TierFault(Exception):
    """A unit could not be written or read; nothing but that unit is lost."""


class TierBusy(TierFault):
    """The tier takes no unit now, since too many are on their way to it."""


class Memory(Protocol):
    """`write` and `read` raise TierFault; a unit is a uint8 tensor [unit_bytes] on the CPU or the device."""

    num_places: int
    reads_can_fail: bool  # of what was written

    @property
    def is_writable(self) -> bool: ...

    def write(self, place: int, unit: torch.Tensor) -> None: ...

    def read(self, place: int) -> torch.Tensor: ...

    def close(self) -> None: ...


class HostMemory:
    """Host memory, pinned where the units come from a GPU, so that copies need no processor.

    `read` gives the place itself: it must be used, or its copy be under way, before the place is written
    again. Copies to and from it go to the current stream.
    """

    reads_can_fail = False

    def __init__(self, num_bytes: int, unit_bytes: int, *, pinned: bool) -> None:
        slabs = pinned_slabs(num_bytes, unit_bytes) if pinned else [num_bytes // unit_bytes]
        self.num_places = sum(slabs)
        if self.num_places == 0:
            raise ConfigError(FIELD, f"{num_bytes} bytes hold no block of {unit_bytes} bytes")
        self._firsts = list(accumulate(slabs[:-1], initial=0))  # each slab's first place
        try:
            self._slabs = [
                torch.empty(num_places, unit_bytes, dtype=torch.uint8, pin_memory=pinned)
                for num_places in slabs
            ]
        except RuntimeError as error:
            raise ConfigError(FIELD, f"{num_bytes} bytes of host memory cannot be had") from error

    @property
    def is_writable(self) -> bool:
        return True

    def write(self, place: int, unit: torch.Tensor) -> None:
        self.read(place).copy_(unit, non_blocking=True)

    def read(self, place: int) -> torch.Tensor:
        slab = bisect_right(self._firsts, place) - 1
        return self._slabs[slab][place - self._firsts[slab]]

    def close(self) -> None:
        """Nothing: the memory goes with the object."""


def pinned_slabs(num_bytes: int, unit_bytes: int) -> list[int]:
    """Units of each of a few allocations that take `num_bytes` at most, and all but less than a unit of each.

    torch rounds pinned memory up to a power of two, so 40 GiB in one piece would take 64.
    """
    powers = (1 << bit for bit in reversed(range(num_bytes.bit_length())))
    return [size // unit_bytes for size in powers if num_bytes & size and size >= unit_bytes]


def check_host_has(num_bytes: int) -> None:
    """Raises ConfigError when the machine has less memory than that."""
    total_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if num_bytes > total_bytes:
        raise ConfigError(FIELD, f"host: {num_bytes} bytes exceed this machine's {total_bytes}")
