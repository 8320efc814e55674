"""A place on the GPU for each running sequence: its row of the block tables, and its last token.

Tables are written entry by entry as blocks are added, so that a step uploads a few numbers, not tables.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from longshore_server.native.sequence import Sequence, SequenceStatus


@dataclass(slots=True)
class _Seat:
    index: int
    table: list[int] = field(default_factory=list)  # the sequence's own list, to notice a new one
    num_written: int = 0


@dataclass(slots=True)
class TableUpdates:
    """Entries of the flat block tables that differ from what the GPU has."""

    places: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)


class Seats:
    """`num_seats` places and one more, `spare`, for the rows that pad a batch."""

    def __init__(self, num_seats: int, num_columns: int, device: torch.device) -> None:
        self.spare = num_seats
        self.num_columns = num_columns
        self.block_tables = torch.zeros(num_seats + 1, num_columns, dtype=torch.int32, device=device)
        self.last_tokens = torch.zeros(num_seats + 1, dtype=torch.int64, device=device)
        self._seats: dict[Sequence, _Seat] = {}
        self._free = list(range(num_seats))[::-1]

    def place(self, sequence: Sequence, updates: TableUpdates) -> int:
        """The sequence's seat; what its table lacks on the GPU is added to `updates`."""
        seat = self._seats.get(sequence) or self._take(sequence)
        if seat.table is not sequence.block_table:
            seat.table, seat.num_written = sequence.block_table, 0
        num_blocks = len(seat.table)
        if seat.num_written < num_blocks:
            first = seat.index * self.num_columns
            updates.places += range(first + seat.num_written, first + num_blocks)
            updates.blocks += seat.table[seat.num_written :]
            seat.num_written = num_blocks
        return seat.index

    def rewrite_all(self) -> None:
        """Forgets what was written, after a step whose updates may not have reached the GPU."""
        for seat in self._seats.values():
            seat.num_written = 0

    def _take(self, sequence: Sequence) -> _Seat:
        if not self._free:
            self._reclaim()
        self._seats[sequence] = seat = _Seat(self._free.pop())
        return seat

    def _reclaim(self) -> None:
        gone = [s for s in self._seats if s.status is not SequenceStatus.RUNNING]
        for sequence in gone:
            self._free.append(self._seats.pop(sequence).index)
