"""The integers behind the randomness: which keys a seed and a position give. The same as the core's."""

from __future__ import annotations

import hashlib

_MASK_64 = (1 << 64) - 1
_MASK_32 = 0xFFFFFFFF


def row_keys(seed: int, position: int) -> tuple[int, int]:
    """Two 32-bit keys for one draw: the answer with `seed`, its token at index `position`."""
    mixed = splitmix64(splitmix64(seed) ^ (position * 0xD1B54A32D192ED03 & _MASK_64))
    return mixed >> 32, mixed & _MASK_32


def splitmix64(value: int) -> int:
    """The output function of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK_64
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK_64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK_64
    return value ^ (value >> 31)


def sub_seed(seed: int, index: int) -> int:
    """The seed of choice number `index`: the request's own for the first, else one derived from it."""
    if index == 0:
        return seed & _MASK_64
    digest = hashlib.sha256(f"{seed & _MASK_64}:{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big")
