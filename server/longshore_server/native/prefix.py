"""How much of a sequence is known already: blocks on the device, then blocks that lie elsewhere.

It names and finds; blocks are taken and filled by the scheduler.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Protocol

from longshore_server.native.blocks import BlockPool
from longshore_server.native.sequence import Sequence


class Offload(Protocol):
    """What the scheduler asks of the place that keeps blocks; see KVOffload."""

    def has(self, key: bytes) -> bool: ...

    def prefers_swap(self, num_blocks: int, num_tokens: int) -> bool: ...

    def prefers_load(self, num_blocks: int, num_tokens: int) -> bool: ...

    def save(self, key: bytes, block: int) -> None: ...

    def evicted(self, block: int, key: bytes) -> None: ...

    def fetch(self, keys: SequenceOf[bytes]) -> int: ...

    def load(self, key: bytes, block: int, *, only_once: bool = False) -> None: ...

    def discard(self, key: bytes) -> None: ...


@dataclass(frozen=True, slots=True)
class KnownPrefix:
    """The first `num_tokens` of a sequence: blocks to share, then keys of blocks to bring in."""

    on_device: list[int]
    elsewhere: list[bytes]
    num_tokens: int

    def cut(self, num_elsewhere: int, block_size: int) -> KnownPrefix:
        """What is left when only the first `num_elsewhere` keys can be brought in."""
        num_blocks = len(self.on_device) + num_elsewhere
        num_tokens = min(self.num_tokens, num_blocks * block_size)
        return KnownPrefix(self.on_device, self.elsewhere[:num_elsewhere], num_tokens)


def find_prefix(sequence: Sequence, pool: BlockPool, offload: Offload | None, is_shared: bool) -> KnownPrefix:
    """The longest known prefix; the last token is always computed anew. `is_shared`: by other requests too.

    Blocks that lie elsewhere count only where bringing them in is predicted to be faster than computing.
    """
    size = pool.block_size
    num_full = (len(sequence.token_ids) - 1) // size
    on_device = pool.match(sequence.digest_blocks(num_full, size)) if is_shared else []
    known = KnownPrefix(on_device, [], len(on_device) * size)
    if offload is None or not (is_shared or sequence.num_swapped_tokens):
        return known
    elsewhere = _find_elsewhere(sequence, len(on_device), num_full, offload, size, is_shared)
    if elsewhere.num_tokens > known.num_tokens and offload.prefers_load(
        len(elsewhere.elsewhere), elsewhere.num_tokens - known.num_tokens
    ):
        return KnownPrefix(on_device, elsewhere.elsewhere, elsewhere.num_tokens)
    return known


def _find_elsewhere(
    sequence: Sequence, start: int, num_full: int, offload: Offload, size: int, is_shared: bool
) -> KnownPrefix:
    keys: list[bytes] = []
    num_tokens = start * size
    for key in unit_keys(sequence, num_full * size, size, is_shared)[start:]:
        if not offload.has(key):
            break
        keys.append(key)
        num_tokens += size
    num_swapped = sequence.num_swapped_tokens
    if num_swapped % size and num_tokens == num_swapped - num_swapped % size:
        tail = unit_keys(sequence, num_swapped, size, is_shared)[-1]
        if offload.has(tail):
            return KnownPrefix([], [*keys, tail], num_swapped)
    return KnownPrefix([], keys, num_tokens)


def unit_keys(sequence: Sequence, num_tokens: int, block_size: int, is_shared: bool) -> list[bytes]:
    """A key for each block of the first `num_tokens`, the last one perhaps part full.

    Shared, they are the tenant-salted digests of the prefix index; else they are the request's own.
    """
    keys = list(sequence.digest_blocks(num_tokens // block_size, block_size))
    if num_tokens % block_size:
        keys.append(sequence.digest_tail(num_tokens, block_size))
    if is_shared:
        return keys
    return [hashlib.sha256(sequence.request_id.encode() + key).digest() for key in keys]
