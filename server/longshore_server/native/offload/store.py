"""Which unit lies where: keys over tiers, least recently used first to go down and at last out.

It moves units between memories and survives their faults; when units are worth moving is decided elsewhere.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence

import torch

from longshore_server.native.offload.memory import Memory, TierFault
from longshore_server.native.offload.moves import Move, Place


class _Tier:
    """One memory's places: of `places`, oldest first, or free."""

    def __init__(self, index: int, memory: Memory) -> None:
        self.index = index
        self.memory = memory
        self.is_closed = False
        self.places: OrderedDict[bytes, int] = OrderedDict()
        self.free: deque[int] = deque(range(memory.num_places))


class TieredStore:
    """Units by key. A key is in one tier at most; pinned keys stay where they are.

    `before_move` is called before a unit is read to go a tier further down: copies under way must end first.
    `on_move` is told of every unit that came to lie somewhere, in this order.
    """

    def __init__(
        self,
        memories: Sequence[Memory],
        before_move: Callable[[], None] = lambda: None,
        on_move: Callable[[Move], None] = lambda _: None,
    ) -> None:
        self._tiers = [_Tier(index, memory) for index, memory in enumerate(memories)]
        self._tier_of: dict[bytes, _Tier] = {}
        self._pins: dict[bytes, int] = {}
        self._before_move = before_move
        self._on_move = on_move
        self.num_faults = 0
        self.num_dropped = 0

    def __contains__(self, key: bytes) -> bool:
        return key in self._tier_of

    def __len__(self) -> int:
        return len(self._tier_of)

    def counts(self) -> list[int]:
        """Units in each tier."""
        return [len(tier.places) for tier in self._tiers]

    def touch(self, key: bytes) -> None:
        """Makes a key the youngest of its tier."""
        self._tier_of[key].places.move_to_end(key)

    def place_of(self, key: bytes) -> Place:
        tier = self._tier_of[key]
        return Place(tier.index, tier.places[key])

    def may_be_unreadable(self, key: bytes) -> bool:
        return self._tier_of[key].memory.reads_can_fail

    def put(self, key: bytes, unit: torch.Tensor, block: int = 0) -> bool:
        """Stores a unit, a block's content, under a new key; False when no tier takes it."""
        assert key not in self._tier_of, "a key is stored once"
        is_stored = self._put(0, key, unit, block)
        self.num_dropped += not is_stored
        return is_stored

    def get(self, key: bytes) -> torch.Tensor | None:
        """The unit, or None if its memory failed; then the key is gone."""
        tier = self._tier_of[key]
        try:
            unit = tier.memory.read(tier.places[key])
        except TierFault:
            self.give_up(key)
            return None
        tier.places.move_to_end(key)
        return unit

    def give_up(self, key: bytes) -> None:
        """Forgets a key whose unit cannot be read, here or by another rank."""
        self.num_faults += 1
        self.discard(key)

    def close_tier(self, index: int) -> None:
        """Puts nothing more into a tier; what is there stays."""
        self._tiers[index].is_closed = True

    def discard(self, key: bytes) -> None:
        """Forgets a key, if it is here."""
        tier = self._tier_of.pop(key, None)
        if tier is not None:
            tier.free.append(tier.places.pop(key))

    def pin(self, key: bytes) -> None:
        self._pins[key] = self._pins.get(key, 0) + 1

    def unpin(self, key: bytes) -> None:
        self._pins[key] -= 1
        if not self._pins[key]:
            del self._pins[key]

    def close(self) -> None:
        for tier in self._tiers:
            tier.memory.close()

    def check_integrity(self) -> None:
        """Raises AssertionError unless every place is free or holds one key that is known to lie there."""
        for tier in self._tiers:
            used = list(tier.places.values())
            assert len(set(used)) == len(used), "two keys share a place"
            assert sorted([*used, *tier.free]) == list(range(tier.memory.num_places)), "a place is lost"
            assert all(self._tier_of[key] is tier for key in tier.places), "a key is in the wrong tier"
        assert len(self._tier_of) == sum(self.counts()), "a key lies nowhere"
        assert all(count > 0 for count in self._pins.values()), "a pin is not counted"
        assert self._pins.keys() <= self._tier_of.keys(), "a pinned key is gone"

    def _put(self, index: int, key: bytes, unit: torch.Tensor, source: int | Place) -> bool:
        if index == len(self._tiers):
            return False
        tier = self._tiers[index]
        if tier.is_closed or not tier.memory.is_writable or not self._make_place(index):
            return self._put(index + 1, key, unit, source)
        place = tier.free.popleft()
        try:
            tier.memory.write(place, unit)
        except TierFault:
            self.num_faults += 1
            tier.free.append(place)
            return self._put(index + 1, key, unit, source)
        tier.places[key] = place
        self._tier_of[key] = tier
        self._on_move(Move(source, Place(index, place)))
        return True

    def _make_place(self, index: int) -> bool:
        tier = self._tiers[index]
        if tier.free:
            return True
        oldest = next((key for key in tier.places if key not in self._pins), None)
        if oldest is None:
            return False
        self._demote(index, oldest)
        return True

    def _demote(self, index: int, key: bytes) -> None:
        unit, source = None, self.place_of(key)
        if index + 1 < len(self._tiers):
            self._before_move()
            unit = self.get(key)
        self.discard(key)
        is_kept = unit is not None and self._put(index + 1, key, unit, source)
        self.num_dropped += not is_kept
