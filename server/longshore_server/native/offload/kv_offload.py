"""KV blocks that leave the device and come back: the scheduler's plans, carried out before each step.

The scheduler names blocks and keys while it plans; `execute` then copies, out first, in second. It decides
nothing about requests: content that is not here, or no longer, is computed again by whoever misses it. With
several ranks these are the only books; the others are told places and do the same with their shards.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch

from longshore_server.native.attention.kv_cache import PagedKVCache
from longshore_server.native.attention.page_bounds import PageBounds
from longshore_server.native.offload.copies import BlockCopies
from longshore_server.native.offload.memory import Memory
from longshore_server.native.offload.moves import Fetched, Fill, Followers, Move, Place
from longshore_server.native.offload.speeds import Rate, Speeds
from longshore_server.native.offload.store import TieredStore

logger = logging.getLogger(__name__)

MAX_TIMINGS = 64


@dataclass(slots=True)
class OffloadCounts:
    """Since the start: blocks copied each way, and how often each way was chosen for a sequence."""

    num_blocks_out: int = 0
    num_blocks_in: int = 0
    num_swaps_chosen: int = 0
    num_recomputes_chosen: int = 0


@dataclass(frozen=True, slots=True)
class _Unit:
    """A unit that was read and will stay where it is until the block is filled."""

    place: Place
    content: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Load:
    key: bytes
    unit: _Unit
    only_once: bool


class KVOffload:
    """Saves and loads for one cache. A key stands for a block's content: equal keys mean equal bytes.

    `followers` are the stores of other ranks, where there are any. Their calls raise RanksLostError; nothing
    else that goes wrong is raised.
    """

    def __init__(
        self,
        cache: PagedKVCache,
        memories: Sequence[Memory],
        bounds: PageBounds | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._copies, self._clock = BlockCopies(cache, bounds), clock
        self._moves: list[Move] = []  # since the followers were told last
        self._has_asked = False  # what they have fetched, since then
        self.followers: Followers | None = None
        self.store = TieredStore(memories, before_move=self._copies.wait, on_move=self._moves.append)
        self.speeds = Speeds()
        self.counts = OffloadCounts()
        self._saves: dict[int, bytes] = {}
        self._loads: dict[int, _Load] = {}
        self._fetched: dict[bytes, _Unit] = {}
        self._timings: deque[tuple[Rate, int, torch.cuda.Event, torch.cuda.Event]] = deque(maxlen=MAX_TIMINGS)

    # --- the scheduler's side: names, no copies ---

    def has(self, key: bytes) -> bool:
        return key in self.store

    def prefers_swap(self, num_blocks: int, num_tokens: int) -> bool:
        """Whether a preempted sequence should be kept rather than computed again; counts the choice."""
        is_chosen = self.speeds.is_swap_faster(num_blocks, num_tokens)
        self.counts.num_swaps_chosen += is_chosen
        self.counts.num_recomputes_chosen += not is_chosen
        return is_chosen

    def prefers_load(self, num_blocks: int, num_tokens: int) -> bool:
        return self.speeds.is_load_faster(num_blocks, num_tokens)

    def save(self, key: bytes, block: int) -> None:
        """Plans to keep a block's content, as it is on the device now."""
        if key in self.store:
            self.store.touch(key)
        elif block not in self._loads:
            self._saves[block] = key

    def evicted(self, block: int, key: bytes) -> None:
        """A cold block leaves the prefix index and will be written over."""
        self.save(key, block)
        self._cancel_load(block)

    def fetch(self, keys: Sequence[bytes]) -> int:
        """Reads and pins units; how many of `keys`, from the first, can be loaded on every rank."""
        here = list(takewhile(self.has, keys))
        places = [self.store.place_of(key) for key in here]
        answer = self._ask([key for key in here if self.store.may_be_unreadable(key)])
        contents = list(takewhile(lambda unit: unit is not None, map(self.store.get, here)))
        unreadable = answer()
        count = min(len(contents), len(here) if unreadable is None else here.index(unreadable))
        for key, place, content in zip(here[:count], places, contents, strict=False):
            assert content is not None
            self.store.pin(key)
            self._fetched[key] = _Unit(place, content)
        return count

    def load(self, key: bytes, block: int, *, only_once: bool = False) -> None:
        """Plans to fill a block with a fetched unit; a later plan for the block takes this one's place."""
        self._cancel_load(block)
        self._loads[block] = _Load(key, self._fetched.pop(key), only_once)

    def discard(self, key: bytes) -> None:
        """Forgets a key that nobody will ask for again."""
        for block, saved in list(self._saves.items()):
            if saved == key:
                del self._saves[block]
        if not any(load.key == key for load in self._loads.values()):
            self.store.discard(key)

    # --- the engine's side ---

    @torch.inference_mode()
    def execute(self) -> list[int]:
        """Does what was planned; returns the blocks that were to be filled and could not be."""
        self._note_timings()
        saves, self._saves = self._saves, {}
        loads, self._loads = self._loads, {}
        for piece in self._copies.pieces(list(saves.items())):
            self._try(lambda piece=piece: self._copy_out(dict(piece)))  # type: ignore[misc]
        lost = [
            block
            for piece in self._copies.pieces(list(loads.items()))
            if not self._try(lambda piece=piece: self._copy_in(dict(piece)))  # type: ignore[misc]
            for block, _ in piece
        ]
        self._tell({block: load for block, load in loads.items() if block not in lost})
        for load in loads.values():
            self.store.unpin(load.key)
            if load.only_once:
                self.store.discard(load.key)
        return lost

    def note_computed(self, num_tokens: int, seconds: float) -> None:
        """A step that was mostly prefill computed so many tokens in so many seconds."""
        self.speeds.compute_token.note(num_tokens, seconds)

    def close(self) -> None:
        self._copies.wait()
        self.store.close()

    def check_integrity(self) -> None:
        """Raises AssertionError unless the tiers' books agree; for use between steps."""
        self.store.check_integrity()
        assert not self._fetched, "a unit was fetched and not loaded"
        assert all(load.key in self.store for load in self._loads.values()), "a unit to load is gone"

    def figures(self) -> dict[str, int]:
        """The counts under the names of EngineStats."""
        return {
            "num_swaps_chosen": self.counts.num_swaps_chosen,
            "num_recomputes_chosen": self.counts.num_recomputes_chosen,
            "num_blocks_swapped_out": self.counts.num_blocks_out,
            "num_blocks_swapped_in": self.counts.num_blocks_in,
            "num_swap_faults": self.store.num_faults,
            "num_blocks_in_swap": len(self.store),
        }

    def _ask(self, keys: Sequence[bytes]) -> Callable[[], bytes | None]:
        """Lets the other ranks read; the callable gives the first key that one of them could not read."""
        if self.followers is None or not keys:
            return lambda: None
        self._has_asked = True
        wait = self.followers.fetch([self.store.place_of(key) for key in keys])
        return lambda: self._take(keys, wait())

    def _take(self, keys: Sequence[bytes], fetched: Fetched) -> bytes | None:
        for tier in fetched.closed_tiers:
            self.store.close_tier(tier)
        if fetched.num_read == len(keys):
            return None
        unreadable = keys[fetched.num_read]
        self.store.give_up(unreadable)
        return unreadable

    def _tell(self, loads: dict[int, _Load]) -> None:
        """Lets the other ranks do what was done here."""
        if self.followers is not None and (self._moves or loads or self._has_asked):
            self.followers.move(self._moves, [Fill(load.unit.place, block) for block, load in loads.items()])
        self._has_asked = False
        self._moves.clear()

    def _try(self, copy: Callable[[], None]) -> bool:
        try:
            copy()
        except Exception:  # a failed copy costs work, never an answer
            self.store.num_faults += 1
            logger.exception("KV blocks could not be copied; they are computed again")
            return False
        return True

    def _copy_out(self, saves: dict[int, bytes]) -> None:
        with self._timed(self.speeds.save_unit, len(saves)), self._copies.taken_out(list(saves)) as units:
            for (block, key), unit in zip(saves.items(), units, strict=True):
                if key not in self.store:
                    self.counts.num_blocks_out += self.store.put(key, unit, block)

    def _copy_in(self, loads: dict[int, _Load]) -> None:
        with self._timed(self.speeds.load_unit, len(loads)):
            self._copies.bring_in(list(loads), [load.unit.content for load in loads.values()])
        self.counts.num_blocks_in += len(loads)

    def _cancel_load(self, block: int) -> None:
        load = self._loads.pop(block, None)
        if load is not None:
            self.store.unpin(load.key)

    @contextlib.contextmanager
    def _timed(self, rate: Rate, count: int) -> Iterator[None]:
        if self._copies.stream is None:
            start_s = self._clock()
            yield
            rate.note(count, self._clock() - start_s)
            return
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._copies.stream.wait_stream(torch.cuda.current_stream())
        start.record(self._copies.stream)
        yield
        end.record(self._copies.stream)
        self._timings.append((rate, count, start, end))

    def _note_timings(self) -> None:
        while self._timings and self._timings[0][3].query():
            rate, count, start, end = self._timings.popleft()
            rate.note(count, start.elapsed_time(end) / 1e3)
