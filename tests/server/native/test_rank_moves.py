"""Blocks that other ranks move along: the messages, and stores that follow the first rank's books blindly."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from longshore_server.native.attention.kv_cache import LayerGeometry, PagedKVCache
from longshore_server.native.errors import RankProtocolError
from longshore_server.native.offload.file_memory import FileMemory
from longshore_server.native.offload.kv_offload import KVOffload
from longshore_server.native.offload.memory import HostMemory, Memory, TierBusy, TierFault
from longshore_server.native.offload.moves import Fetched, Fill, Move, Place
from longshore_server.native.offload.shard_store import ShardStore
from longshore_server.native.offload.spec import MAX_TIERS
from longshore_server.native.offload.units import unit_bytes
from longshore_server.native.ranks.moves import (
    fetch_payload,
    fetched_payload,
    move_payload,
    read_fetch,
    read_fetched,
    read_move,
)

NUMBER = st.integers(0, 2**62)
PLACE = st.builds(Place, st.integers(0, MAX_TIERS - 1), NUMBER)
MOVES = st.lists(st.builds(Move, NUMBER | PLACE, PLACE), max_size=6)
FILLS = st.lists(st.builds(Fill, PLACE, NUMBER), max_size=6)
FETCHED = st.builds(Fetched, NUMBER, st.frozensets(st.integers(0, MAX_TIERS - 1)))


# --- messages ---


@given(MOVES, FILLS)
def test_moves_are_read_as_they_were_told(moves: list[Move], fills: list[Fill]) -> None:
    assert read_move(move_payload(moves, fills)) == (moves, fills)


@given(NUMBER, st.lists(PLACE, max_size=6), FETCHED)
def test_what_is_asked_and_answered_is_read_as_it_was_told(
    serial: int, places: list[Place], fetched: Fetched
) -> None:
    assert read_fetch(fetch_payload(serial, places)) == (serial, places)
    assert read_fetched(fetched_payload(serial, fetched)) == (serial, fetched)


@given(MOVES, FILLS, st.binary(max_size=120), st.integers(0), st.integers(0, 255))
def test_any_bytes_are_moves_or_refused(
    moves: list[Move], fills: list[Fill], noise: bytes, place: int, value: int
) -> None:
    sound = bytearray(move_payload(moves, fills))
    sound[place % len(sound)] = value
    for payload in (noise, bytes(sound)):
        for read in (read_move, read_fetch, read_fetched):
            with contextlib.suppress(RankProtocolError):
                read(payload)
    for cut in (1, 8):
        with pytest.raises(RankProtocolError):
            read_move(move_payload(moves, fills)[:-cut])


@pytest.mark.parametrize(
    "payload",
    [
        move_payload([Move(Place(MAX_TIERS, 0), Place(0, 0))], []),
        move_payload([Move(3, Place(0, -1))], []),
        move_payload([Move(-3, Place(0, 1))], []),
        move_payload([], [Fill(Place(-1, 0), 1)]),
        move_payload([], [Fill(Place(0, 0), -1)]),
    ],
)
def test_places_and_blocks_that_cannot_be_are_refused(payload: bytes) -> None:
    with pytest.raises(RankProtocolError, match="there is no"):
        read_move(payload)


# --- stores ---

NUM_BLOCKS, HOST, FILE, NUM_KEYS = 6, 1, 2, 12


class FlakyFile(FileMemory):
    """A file that fails when `fails` says so."""

    fails: Callable[[], bool]
    is_full = False

    @property
    def is_writable(self) -> bool:
        return not self.is_full and super().is_writable

    def write(self, place: int, unit: torch.Tensor) -> None:
        if self.fails():
            raise TierBusy("on purpose")
        super().write(place, unit)

    def read(self, place: int) -> torch.Tensor:
        if self.fails():
            raise TierFault("on purpose")
        return super().read(place)


class Follower:
    """Another rank's store behind the coding of its messages."""

    def __init__(self, store: ShardStore) -> None:
        self.store = store
        self.num_told = 0

    def fetch(self, places: Sequence[Place]) -> Callable[[], Fetched]:
        serial, asked = read_fetch(fetch_payload(7, places))
        answer = fetched_payload(serial, self.store.fetch(asked))
        return lambda: read_fetched(answer)[1]

    def move(self, moves: Sequence[Move], fills: Sequence[Fill]) -> None:
        self.num_told += 1
        self.store.move(*read_move(move_payload(moves, fills)))


class Ranks:
    """Two ranks' caches, of which a key's content differs; one has the books."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        geometry = [LayerGeometry(1, 4, 4), LayerGeometry(1, 4, 4)]
        self.caches = [
            PagedKVCache(geometry, NUM_BLOCKS, 1, torch.float32, torch.device("cpu")) for _ in "ab"
        ]
        self.files: list[FlakyFile] = []
        self.has_host = self.draw(st.booleans())
        self.offload = KVOffload(self.caches[0], self._memories())
        self.follower = Follower(ShardStore(self.caches[1], self._memories()))
        self.offload.followers = self.follower
        self.keys: dict[int, int] = {}  # what the blocks hold, where they hold something

    def draw(self, strategy: st.SearchStrategy[Any]) -> Any:
        return self.data.draw(strategy)

    def _memories(self) -> list[Memory]:
        size = unit_bytes(self.caches[0])
        file = FlakyFile(os.environ.get("TMPDIR", "/tmp"), FILE * size, size)
        file.fails = lambda: self.draw(st.integers(0, 5)) == 5
        self.files.append(file)
        host = [HostMemory(HOST * size, size, pinned=False)] if self.has_host else []
        return [*host, file]

    def compute(self, block: int, key: int) -> None:
        self.keys[block] = key
        for rank, cache in enumerate(self.caches):
            for layer in range(2):
                cache.keys[layer][block] = cache.values[layer][block] = self.content(rank, layer, key)

    def content(self, rank: int, layer: int, key: int) -> float:
        return 1000.0 * rank + 100.0 * layer + key

    def step(self) -> None:
        """Saves, loads into other blocks, and computes over what is left."""
        blocks = self.draw(st.permutations(range(NUM_BLOCKS)))
        for block in blocks[: self.draw(st.integers(0, 4))]:
            if block in self.keys:
                self.offload.evicted(block, _name(self.keys.pop(block)))
        empty = [block for block in blocks if block not in self.keys]
        kept = [key for key in range(NUM_KEYS) if self.offload.has(_name(key))]
        wanted = self.draw(st.permutations(kept))[: self.draw(st.integers(0, len(empty)))]
        count = self.offload.fetch([_name(key) for key in wanted])
        loads = dict(zip(empty, wanted[:count], strict=False))
        for block, key in loads.items():
            self.offload.load(_name(key), block, only_once=self.draw(st.booleans()))
        lost = self.offload.execute()
        assert not lost
        self.keys |= loads
        self.offload.check_integrity()

    def check(self) -> None:
        for block, key in self.keys.items():
            for rank, cache in enumerate(self.caches):
                for layer in range(2):
                    wanted = torch.full((4,), self.content(rank, layer, key))
                    assert torch.equal(cache.keys[layer][block].view(-1), wanted), (rank, block, key)
                    assert torch.equal(cache.values[layer][block].view(-1), wanted), (rank, block, key)

    def close(self) -> None:
        for file in self.files:
            file.close()


def _name(key: int) -> bytes:
    return b"key %d" % key


@settings(deadline=None)
@given(st.data())
def test_a_store_without_books_has_its_own_shard_of_every_block(data: st.DataObject) -> None:
    """Whatever fails on either rank costs units; no block is ever filled with something else."""
    with contextlib.closing(Ranks(data)) as ranks:
        for _ in range(12):
            for block in range(NUM_BLOCKS):
                if block not in ranks.keys and data.draw(st.booleans()):
                    ranks.compute(block, data.draw(st.integers(0, NUM_KEYS - 1)))
            if data.draw(st.integers(0, 19)) == 19:
                ranks.files[data.draw(st.integers(0, 1))].is_full = True
            if data.draw(st.booleans()):
                ranks.offload.discard(_name(data.draw(st.integers(0, NUM_KEYS - 1))))
            ranks.step()
            ranks.check()


def test_what_another_rank_cannot_read_is_given_up_and_its_full_tier_is_closed() -> None:
    cache = PagedKVCache([LayerGeometry(1, 4, 4)], 4, 1, torch.float32, torch.device("cpu"))
    size, folder = unit_bytes(cache), os.environ.get("TMPDIR", "/tmp")
    files = [FlakyFile(folder, 4 * size, size) for _ in "ab"]
    for file in files:
        file.fails = lambda: False
    offload = KVOffload(cache, files[:1])
    follower = Follower(ShardStore(cache, files[1:]))
    offload.followers = follower
    for block in range(2):
        offload.save(_name(block), block)
        offload.execute()
        files[1].fails = lambda: True
    files[1].fails, files[1].is_full = lambda: False, True
    assert offload.fetch([_name(0), _name(1)]) == 1
    assert not offload.has(_name(1)) and offload.store.num_faults == 1
    offload.load(_name(0), 2)
    offload.execute()
    offload.save(_name(2), 3)
    offload.execute()
    assert not offload.has(_name(2)), "no rank writes what one of them would miss"
    offload.check_integrity()
    for file in files:
        file.close()


def test_other_ranks_are_told_nothing_where_nothing_moves() -> None:
    cache = PagedKVCache([LayerGeometry(1, 4, 4)], 4, 1, torch.float32, torch.device("cpu"))
    memories = [[HostMemory(4 * unit_bytes(cache), unit_bytes(cache), pinned=False)] for _ in "ab"]
    offload = KVOffload(cache, memories[0])
    offload.followers = follower = Follower(ShardStore(cache, memories[1]))
    offload.execute()
    assert follower.num_told == 0
    offload.save(b"key", 1)
    offload.execute()
    offload.execute()
    assert follower.num_told == 1
