"""What ranks say of KV blocks that leave the device and come back: packed as 64-bit integers. Free of I/O.

MOVE: two counts, then moves (source tier, or -1 for a block; source; target tier; target), then fills (tier,
place, block). FETCH: a serial, then places (tier, place). FETCHED: the serial, how many were read, closed
tiers as bits.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from longshore_server.native.errors import RankProtocolError
from longshore_server.native.offload.moves import Fetched, Fill, Move, Place
from longshore_server.native.offload.spec import MAX_TIERS
from longshore_server.native.ranks.messages import read_ints

BLOCK = -1
_INT = array("q").typecode
_MOVE_INTS, _FILL_INTS, _PLACE_INTS = 4, 3, 2


def move_payload(moves: Sequence[Move], fills: Sequence[Fill]) -> bytes:
    numbers = array(_INT, [len(moves), len(fills)])
    for move in moves:
        source = (BLOCK, move.source) if isinstance(move.source, int) else move.source
        numbers.extend((*source, *move.target))
    for fill in fills:
        numbers.extend((*fill.place, fill.block))
    return numbers.tobytes()


def read_move(payload: bytes) -> tuple[list[Move], list[Fill]]:
    """Raises RankProtocolError on anything that move_payload() does not make."""
    numbers = read_ints(payload, _INT)
    num_moves, num_fills = numbers[:2] if len(numbers) >= 2 else (BLOCK, BLOCK)
    fills_at = 2 + _MOVE_INTS * num_moves
    if min(num_moves, num_fills) < 0 or len(numbers) != fills_at + _FILL_INTS * num_fills:
        raise RankProtocolError(f"{len(numbers)} numbers are not what moves and fills they announce")
    moves = [_move(*row) for row in _rows(numbers[2:fills_at], _MOVE_INTS)]
    return moves, [
        Fill(_place(tier, number), _block(block))
        for tier, number, block in _rows(numbers[fills_at:], _FILL_INTS)
    ]


def fetch_payload(serial: int, places: Sequence[Place]) -> bytes:
    return array(_INT, [serial, *(number for place in places for number in place)]).tobytes()


def read_fetch(payload: bytes) -> tuple[int, list[Place]]:
    """Serial and places; raises RankProtocolError."""
    numbers = read_ints(payload, _INT)
    if len(numbers) % _PLACE_INTS != 1:
        raise RankProtocolError(f"{len(numbers)} numbers are not a serial and places")
    return numbers[0], [_place(*row) for row in _rows(numbers[1:], _PLACE_INTS)]


def fetched_payload(serial: int, fetched: Fetched) -> bytes:
    closed = sum(1 << tier for tier in fetched.closed_tiers)
    return array(_INT, [serial, fetched.num_read, closed]).tobytes()


def read_fetched(payload: bytes) -> tuple[int, Fetched]:
    """Serial and answer; raises RankProtocolError."""
    numbers = read_ints(payload, _INT)
    if len(numbers) != 3 or numbers[1] < 0 or not 0 <= numbers[2] < 1 << MAX_TIERS:
        raise RankProtocolError("an answer about fetched units is not sound")
    serial, num_read, closed = numbers
    return serial, Fetched(num_read, frozenset(tier for tier in range(MAX_TIERS) if closed >> tier & 1))


def _move(source_tier: int, source: int, tier: int, number: int) -> Move:
    where = _block(source) if source_tier == BLOCK else _place(source_tier, source)
    return Move(where, _place(tier, number))


def _place(tier: int, number: int) -> Place:
    if not 0 <= tier < MAX_TIERS or number < 0:
        raise RankProtocolError(f"there is no place {number} of tier {tier}")
    return Place(tier, number)


def _block(block: int) -> int:
    if block < 0:
        raise RankProtocolError(f"there is no block {block}")
    return block


def _rows(numbers: Sequence[int], size: int) -> list[Sequence[int]]:
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]
