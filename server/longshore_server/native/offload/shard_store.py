"""The units of a rank that keeps no books: it does with its shard what the first rank did with its own.

A unit that cannot be written or read is missing, and the first rank hears of it before the unit is used.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from longshore_server.native.attention.kv_cache import PagedKVCache
from longshore_server.native.attention.page_bounds import PageBounds
from longshore_server.native.offload.copies import BlockCopies
from longshore_server.native.offload.memory import Memory, TierFault
from longshore_server.native.offload.moves import Fetched, Fill, Move, Place


class ShardStore:
    """Memories of the tiers that the first rank has, with as many places in each.

    Calls come in the first rank's order. What fails otherwise than with TierFault is raised, and ends the
    rank: the first one cannot know of it.
    """

    def __init__(
        self, cache: PagedKVCache, memories: Sequence[Memory], bounds: PageBounds | None = None
    ) -> None:
        self._copies = BlockCopies(cache, bounds)
        self._memories = memories
        self._missing: set[Place] = set()  # what lies there is not what the first rank has there
        self._fetched: dict[Place, torch.Tensor] = {}

    def fetch(self, places: Sequence[Place]) -> Fetched:
        """Reads units and keeps them for the fills of the next move()."""
        closed = frozenset(tier for tier, memory in enumerate(self._memories) if not memory.is_writable)
        for num_read, place in enumerate(places):
            unit = self._fetched.get(place)
            if unit is None:
                unit = self._read(place)
            if unit is None:
                return Fetched(num_read, closed)
            self._fetched[place] = unit
        return Fetched(len(places), closed)

    @torch.inference_mode()
    def move(self, moves: Sequence[Move], fills: Sequence[Fill]) -> None:
        for few in self._copies.pieces(moves):
            self._move(few)
        for some in self._copies.pieces(fills):
            self._copies.bring_in([fill.block for fill in some], [self._unit(fill.place) for fill in some])
        self._fetched.clear()

    def _move(self, moves: Sequence[Move]) -> None:
        with self._copies.taken_out([m.source for m in moves if isinstance(m.source, int)]) as units:
            rest = iter(units)
            for move in moves:
                if isinstance(move.source, int):
                    self._write(move.target, next(rest))
                else:
                    self._copies.wait()
                    self._write(move.target, self._read(move.source))

    def _write(self, place: Place, unit: torch.Tensor | None) -> None:
        self._missing.add(place)
        if unit is None:
            return
        try:
            self._memories[place.tier].write(place.number, unit)
        except TierFault:
            return
        self._missing.discard(place)

    def _read(self, place: Place) -> torch.Tensor | None:
        if place in self._missing:
            return None
        try:
            return self._memories[place.tier].read(place.number)
        except TierFault:
            return None

    def _unit(self, place: Place) -> torch.Tensor:
        """What was fetched, or what cannot but be there: it was not asked for."""
        if place in self._fetched:
            return self._fetched[place]
        unit = None if self._memories[place.tier].reads_can_fail else self._read(place)
        if unit is None:
            raise RuntimeError(f"a block is to be filled from {place}, and nothing was fetched there")
        return unit
