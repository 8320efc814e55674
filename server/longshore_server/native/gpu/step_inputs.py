"""A step's numbers for the GPU: packed into one host array, so that one copy brings them over.

Everything is int64; temperatures travel as the bits of a float64. Fields start at even places, since kernels
are compiled anew for pointers of another alignment.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np
import torch

from longshore.seeds import row_keys
from longshore_server.native.scheduler import Chunk
from longshore_server.native.sequence import Sequence

ON_GPU = -1  # stands for a token id that the host has not seen


def even(size: int) -> int:
    """Numbers from the start of a field of this size to the next field's."""
    return size + size % 2


class Packer:
    """Collects fields, then gives them as one pinned tensor; field() finds them in its copy."""

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []
        self._places: dict[str, slice] = {}
        self._size = 0

    def add(self, name: str, values: SequenceOf[int] | np.ndarray) -> None:
        array = np.asarray(values, dtype=np.int64)
        self._places[name] = slice(self._size, self._size + len(array))
        self._parts += [array] if len(array) % 2 == 0 else [array, np.zeros(1, np.int64)]
        self._size += even(len(array))

    def packed(self, pinned: bool) -> torch.Tensor:
        tensor = torch.empty(self._size, dtype=torch.int64, pin_memory=pinned)
        np.concatenate(self._parts, out=tensor.numpy())
        return tensor

    def field(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        return tensor[self._places[name]]


def token_ids(chunk: Chunk) -> SequenceOf[int]:
    """The chunk's tokens; a token that is still in flight is ON_GPU."""
    sequence = chunk.sequence
    known = sequence.token_ids[chunk.start : chunk.context_len]
    return known if len(known) == chunk.num_tokens else [*known, ON_GPU]


def slots(chunk: Chunk, block_size: int) -> np.ndarray:
    """The places of the chunk's tokens in the cache."""
    start = chunk.start
    table = chunk.sequence.block_table
    if chunk.num_tokens == 1:
        return np.array([table[start // block_size] * block_size + start % block_size])
    positions = np.arange(start, chunk.context_len)
    first = start // block_size
    blocks = np.array(table[first : (positions[-1] // block_size) + 1], dtype=np.int64)
    return blocks[positions // block_size - first] * block_size + positions % block_size


def temperature_bits(sequences: SequenceOf[Sequence]) -> np.ndarray:
    """Each row's temperature, 0 where it is greedy."""
    values = [0.0 if s.params.is_greedy else s.params.temperature for s in sequences]
    return np.array(values, dtype=np.float64).view(np.int64)


def noise_keys(sequences: SequenceOf[Sequence]) -> np.ndarray:
    """[2 * rows]; greedy rows need none."""
    keys = np.zeros((len(sequences), 2), dtype=np.int64)
    for row, sequence in enumerate(sequences):
        if not sequence.params.is_greedy:
            keys[row] = row_keys(sequence.params.seed, sequence.next_offset)
    return keys.reshape(-1)
