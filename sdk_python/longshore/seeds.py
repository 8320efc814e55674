"""The integers behind sampling's randomness: which keys a seed and a position give. No state, no floats.

Core and device share it, so that an answer begun on either can be gone on with on the other.
"""

from __future__ import annotations

__all__ = ["row_keys", "splitmix64", "sub_seed"]

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
    """The seed, 0..2**64-1, of the `index`-th of several answers to one request; 0 keeps the request's."""
    seed &= _MASK_64
    return seed if index == 0 else splitmix64(seed ^ splitmix64(index))
