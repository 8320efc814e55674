"""Seeds and the keys of single draws, in plain integers: the part of randomness that needs no torch."""

from __future__ import annotations

_MASK_64 = (1 << 64) - 1
_MASK_32 = (1 << 32) - 1


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
    """The seed of the `index`-th of several answers to one request; index 0 keeps the seed."""
    return seed if index == 0 else splitmix64(seed ^ splitmix64(index))
