"""KV blocks that leave the device and come back: the scheduler's plans, carried out before each step.

The scheduler names blocks and keys while it plans; `execute` then copies, out first, in second. It decides
nothing about requests: content that is not here, or no longer, is computed again by whoever misses it.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from longshore_server.native.attention.kv_cache import PagedKVCache
from longshore_server.native.attention.page_bounds import PageBounds
from longshore_server.native.offload.file_memory import FileMemory
from longshore_server.native.offload.memory import HostMemory, Memory
from longshore_server.native.offload.spec import TierSpec
from longshore_server.native.offload.speeds import Rate, Speeds
from longshore_server.native.offload.store import TieredStore
from longshore_server.native.offload.units import read_units, unit_bytes, write_units

logger = logging.getLogger(__name__)

MAX_TIMINGS = 64
MAX_STAGING_BYTES = 256 << 20

_Item = TypeVar("_Item")


@dataclass(slots=True)
class OffloadCounts:
    """Since the start: blocks copied each way, and how often each way was chosen for a sequence."""

    num_blocks_out: int = 0
    num_blocks_in: int = 0
    num_swaps_chosen: int = 0
    num_recomputes_chosen: int = 0


@dataclass(frozen=True, slots=True)
class _Load:
    key: bytes
    unit: torch.Tensor
    only_once: bool


class KVOffload:
    """Saves and loads for one cache. A key stands for a block's content: equal keys mean equal bytes."""

    def __init__(
        self,
        cache: PagedKVCache,
        memories: Sequence[Memory],
        bounds: PageBounds | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._cache, self._bounds, self._clock = cache, bounds, clock
        self._stream = torch.cuda.Stream(cache.device) if cache.device.type == "cuda" else None
        self.store = TieredStore(memories, before_move=self._wait_for_copies)
        self.speeds = Speeds()
        self.counts = OffloadCounts()
        self._saves: dict[int, bytes] = {}
        self._loads: dict[int, _Load] = {}
        self._fetched: dict[bytes, torch.Tensor] = {}
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
        """Reads and pins units; how many of `keys`, from the first, can be loaded."""
        for count, key in enumerate(keys):
            unit = self.store.get(key) if key in self.store else None
            if unit is None:
                return count
            self.store.pin(key)
            self._fetched[key] = unit
        return len(keys)

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
        for piece in self._pieces(list(saves.items())):
            self._try(lambda piece=piece: self._copy_out(dict(piece)))  # type: ignore[misc]
        lost = [
            block
            for piece in self._pieces(list(loads.items()))
            if not self._try(lambda piece=piece: self._copy_in(dict(piece)))  # type: ignore[misc]
            for block, _ in piece
        ]
        for load in loads.values():
            self.store.unpin(load.key)
            if load.only_once:
                self.store.discard(load.key)
        return lost

    def note_computed(self, num_tokens: int, seconds: float) -> None:
        """A step that was mostly prefill computed so many tokens in so many seconds."""
        self.speeds.compute_token.note(num_tokens, seconds)

    def close(self) -> None:
        self._wait_for_copies()
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

    def _pieces(self, planned: list[_Item]) -> Iterator[list[_Item]]:
        """What fits the staging memory at a time; each piece's copies end before the next one's begin."""
        size = max(1, MAX_STAGING_BYTES // unit_bytes(self._cache))
        for start in range(0, len(planned), size):
            if start:
                self._wait_for_copies()
            yield planned[start : start + size]

    def _try(self, copy: Callable[[], None]) -> bool:
        try:
            copy()
        except Exception:  # a failed copy costs work, never an answer
            self.store.num_faults += 1
            logger.exception("KV blocks could not be copied; they are computed again")
            return False
        return True

    def _copy_out(self, saves: dict[int, bytes]) -> None:
        """To a staging copy first, so that the blocks are free while the slow copy runs beside the step."""
        with self._timed(self.speeds.save_unit, len(saves)):
            units = read_units(self._cache, list(saves))
            with self._beside(units):
                for key, unit in zip(saves.values(), units, strict=True):
                    if key not in self.store:
                        self.counts.num_blocks_out += self.store.put(key, unit)

    def _copy_in(self, loads: dict[int, _Load]) -> None:
        with self._timed(self.speeds.load_unit, len(loads)):
            shape = (len(loads), unit_bytes(self._cache))
            units = torch.empty(shape, dtype=torch.uint8, device=self._cache.device)
            with self._beside(units):
                for unit, load in zip(units, loads.values(), strict=True):
                    unit.copy_(load.unit, non_blocking=True)
            if self._stream is not None:
                torch.cuda.current_stream().wait_stream(self._stream)
            write_units(self._cache, list(loads), units)
            if self._bounds is not None:
                self._bounds.update_all(torch.tensor(list(loads), device=self._cache.device))
        self.counts.num_blocks_in += len(loads)

    def _cancel_load(self, block: int) -> None:
        load = self._loads.pop(block, None)
        if load is not None:
            self.store.unpin(load.key)

    @contextlib.contextmanager
    def _beside(self, units: torch.Tensor) -> Iterator[None]:
        """The side stream, after what the main one has been given so far; nothing special on a CPU."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        units.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            yield

    @contextlib.contextmanager
    def _timed(self, rate: Rate, count: int) -> Iterator[None]:
        if self._stream is None:
            start_s = self._clock()
            yield
            rate.note(count, self._clock() - start_s)
            return
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._stream.wait_stream(torch.cuda.current_stream())
        start.record(self._stream)
        yield
        end.record(self._stream)
        self._timings.append((rate, count, start, end))

    def _note_timings(self) -> None:
        while self._timings and self._timings[0][3].query():
            rate, count, start, end = self._timings.popleft()
            rate.note(count, start.elapsed_time(end) / 1e3)

    def _wait_for_copies(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()


def open_offload(
    cache: PagedKVCache, tiers: Sequence[TierSpec], bounds: PageBounds | None = None
) -> KVOffload | None:
    """The memories of `tiers` behind one KVOffload, or None without tiers; raises ConfigError."""
    if not tiers:
        return None
    size = unit_bytes(cache)
    is_cuda = cache.device.type == "cuda"
    memories: list[Memory] = []
    for tier in tiers:
        if tier.path is None:
            memories.append(HostMemory(tier.num_bytes, size, pinned=is_cuda))
        else:
            memories.append(FileMemory(tier.path, tier.num_bytes, size))
    return KVOffload(cache, memories, bounds)
