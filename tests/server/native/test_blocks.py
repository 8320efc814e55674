"""The block pool against a model of itself: any sequence of calls leaves its books in order."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from longshore_server.native.blocks import BlockPool
from longshore_server.native.errors import OutOfBlocksError

NUM_BLOCKS = 12


class PoolMachine(RuleBasedStateMachine):
    """Tables are lists of blocks; the digest of a block stands for its content."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, block_size=4)
        self.tables: list[list[int]] = []
        self.content: dict[int, bytes] = {}  # published content, by block

    @rule(count=st.integers(0, NUM_BLOCKS + 2))
    def allocate(self, count: int) -> None:
        held = {block for table in self.tables for block in table}
        if count > NUM_BLOCKS - len(held):
            with pytest.raises(OutOfBlocksError):
                self.pool.allocate(count)
            return
        blocks = self.pool.allocate(count)
        assert len(set(blocks)) == count and not held & set(blocks)
        for block in blocks:
            self.content.pop(block, None)
        self.tables.append(blocks)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.pool.release(self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1))))

    @precondition(lambda self: any(self.tables))
    @rule(data=st.data(), digest=st.binary(min_size=1, max_size=1))
    def publish(self, data: st.DataObject, digest: bytes) -> None:
        table = data.draw(st.sampled_from([table for table in self.tables if table]))
        block = data.draw(st.sampled_from(table))
        if block not in self.content and digest not in self.content.values():
            self.content[block] = digest
        self.pool.publish(block, digest)

    @rule(digests=st.lists(st.binary(min_size=1, max_size=1), max_size=3, unique=True))
    def share(self, digests: list[bytes]) -> None:
        blocks = self.pool.match(digests)
        assert [self.content[block] for block in blocks] == digests[: len(blocks)]
        if len(blocks) < len(digests):
            assert digests[len(blocks)] not in self.content.values()
        before = self.pool.num_available
        held = {block for table in self.tables for block in table}
        self.pool.share(blocks)
        assert self.pool.num_available == before - len(set(blocks) - held)
        self.tables.append(blocks)

    @precondition(lambda self: any(self.tables))
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from([table for table in self.tables if table]))
        self.pool.forget(table)
        for block in table:
            self.content.pop(block, None)

    @invariant()
    def books_are_in_order(self) -> None:
        self.pool.check_integrity(self.tables)
        held = {block for table in self.tables for block in table}
        assert self.pool.num_used == len(held)
        assert self.pool.usage == len(held) / NUM_BLOCKS


TestPool = PoolMachine.TestCase
TestPool.settings = settings(stateful_step_count=40)


def test_cached_blocks_are_evicted_least_recently_used_first() -> None:
    pool = BlockPool(3, block_size=4)
    first, second, third = pool.allocate(3)
    for block, digest in ((first, b"1"), (second, b"2"), (third, b"3")):
        pool.publish(block, digest)
        pool.release([block])
    pool.share(pool.match([b"1"]))  # used again, so the youngest
    pool.release([first])
    assert pool.allocate(1) == [second]
    assert pool.match([b"2"]) == [] and pool.match([b"3"]) == [third] and pool.match([b"1"]) == [first]


def test_a_tail_is_evicted_before_its_prefix() -> None:
    pool = BlockPool(2, block_size=4)
    table = pool.allocate(2)
    for block, digest in zip(table, (b"head", b"tail"), strict=True):
        pool.publish(block, digest)
    pool.release(table)
    pool.allocate(1)
    assert pool.match([b"head", b"tail"]) == [table[0]]


def test_integrity_check_sees_a_lost_block() -> None:
    pool = BlockPool(4, block_size=4)
    pool.allocate(2)
    with pytest.raises(AssertionError):
        pool.check_integrity([])
