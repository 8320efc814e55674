"""Where units went, by their places instead of their keys: enough for another rank to do the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol


class Place(NamedTuple):
    """Where a unit lies: a place of one of the tiers."""

    tier: int
    number: int


@dataclass(frozen=True, slots=True)
class Move:
    """A unit was put at `target`: a block's content, or what lay at another place."""

    source: int | Place
    target: Place


@dataclass(frozen=True, slots=True)
class Fill:
    """A block was filled with the unit that lies, or lay when it was fetched, at `place`."""

    place: Place
    block: int


@dataclass(frozen=True, slots=True)
class Fetched:
    """How many of the places that were asked for could be read, from the first, and what takes no more."""

    num_read: int
    closed_tiers: frozenset[int] = frozenset()


class Followers(Protocol):
    """The stores of the other ranks, which do with their shards what the first rank does with its own.

    Calls are carried out in their order, and in order with the steps; raises RanksLostError.
    """

    def fetch(self, places: Sequence[Place]) -> Callable[[], Fetched]:
        """Lets the others read units; the callable waits, and gives what all of them could do."""
        ...

    def move(self, moves: Sequence[Move], fills: Sequence[Fill]) -> None:
        """Lets the others move units, then fill blocks; what they have fetched is forgotten after that."""
        ...
