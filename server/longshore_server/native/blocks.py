"""The KV block pool: who holds which block, and which full blocks can be shared by prefix.

It knows block numbers and digests, never tensors or requests; the scheduler is its only user.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence

from longshore_server.native.errors import OutOfBlocksError


class BlockPool:
    """Reference-counted blocks with a prefix index.

    A block is in use (referenced), cached (unreferenced, its content still indexed, evicted in the order of
    last use), or free. Only full blocks are indexed.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._ref_counts = [0] * num_blocks
        self._digest_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._free: deque[int] = deque(range(num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first
        self.on_evict: Callable[[int, bytes], None] | None = None  # told of block and digest before reuse

    @property
    def num_available(self) -> int:
        """Blocks that allocate() could give now, cached ones included."""
        return len(self._free) + len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_available

    def is_used(self, block: int) -> bool:
        return self._ref_counts[block] > 0

    @property
    def usage(self) -> float:
        """Share of the blocks that are referenced, 0..1."""
        return self.num_used / self.num_blocks

    def allocate(self, count: int) -> list[int]:
        """Takes `count` blocks with one reference each; raises OutOfBlocksError and takes none if too few."""
        if count > self.num_available:
            raise OutOfBlocksError(f"{count} blocks asked for, {self.num_available} available")
        blocks = [self._free.popleft() if self._free else self._evict() for _ in range(count)]
        for block in blocks:
            self._ref_counts[block] = 1
        return blocks

    def match(self, digests: Iterable[bytes]) -> list[int]:
        """Blocks of the longest indexed prefix of `digests`; takes no reference."""
        blocks = []
        for digest in digests:
            block = self._block_of.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def lookup(self, digest: bytes) -> int | None:
        """The block that is indexed under a digest."""
        return self._block_of.get(digest)

    def is_indexed(self, block: int) -> bool:
        return self._digest_of[block] is not None

    def share(self, blocks: Sequence[int]) -> None:
        """Adds a reference to blocks that match() gave."""
        for block in blocks:
            if self._ref_counts[block] == 0:
                del self._cached[block]
            self._ref_counts[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drops one reference of each; the tail is released first, so that prefixes outlive their endings."""
        for block in reversed(blocks):
            assert self._ref_counts[block] > 0, f"block {block} released twice"
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                self._retire(block)

    def publish(self, block: int, digest: bytes) -> None:
        """Indexes a full, computed block; a digest that is indexed already keeps its first block."""
        if digest not in self._block_of and self._digest_of[block] is None:
            self._block_of[digest] = block
            self._digest_of[block] = digest

    def forget(self, blocks: Sequence[int]) -> None:
        """Takes referenced blocks out of the prefix index, so that no later request shares them."""
        for block in blocks:
            digest = self._digest_of[block]
            if digest is not None:
                del self._block_of[digest]
                self._digest_of[block] = None

    def check_integrity(self, block_tables: Iterable[Sequence[int]]) -> None:
        """Raises AssertionError unless the counts are those of `block_tables` and the index is sound."""
        references = Counter(block for table in block_tables for block in table)
        for block, count in enumerate(self._ref_counts):
            assert count == references[block], f"block {block}: {count} counted, {references[block]} held"
        unreferenced = {block for block, count in enumerate(self._ref_counts) if count == 0}
        assert len(self._free) == len(set(self._free)), "a block is free twice"
        assert unreferenced == set(self._free) ^ set(self._cached), (
            "free and cached must partition the unreferenced"
        )
        assert all(self._digest_of[block] is None for block in self._free), "a free block is indexed"
        assert all(self._digest_of[block] is not None for block in self._cached), (
            "a cached block is not indexed"
        )
        indexed = {digest: block for block, digest in enumerate(self._digest_of) if digest is not None}
        assert indexed == self._block_of, "index and blocks disagree"

    def _retire(self, block: int) -> None:
        if self._digest_of[block] is None:
            self._free.appendleft(block)  # warm in the CPU's caches: reuse it first
        else:
            self._cached[block] = None

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        digest = self._digest_of[block]
        assert digest is not None
        if self.on_evict is not None:
            self.on_evict(block, digest)
        del self._block_of[digest]
        self._digest_of[block] = None
        return block
