"""How the flat rows of one step lie over sequences and KV blocks. Plain numbers, no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive rows of one sequence: its tokens `context_len - num_rows` up to `context_len`."""

    first_row: int
    num_rows: int
    context_len: int  # tokens of the sequence up to and including these rows
    block_table: Sequence[int]
    num_prompt_tokens: int = 0  # tokens behind these were generated


@dataclass(frozen=True, slots=True)
class BatchLayout:
    """`decodes` are spans of one row and stand first, shortest context first; `prefills` follow."""

    decodes: list[Span]
    prefills: list[Span]
    block_size: int

    @property
    def num_rows(self) -> int:
        return len(self.decodes) + sum(span.num_rows for span in self.prefills)

    def slots(self) -> list[int]:
        """For each row, the index of its token's place in the KV cache: block * block_size + offset."""
        size = self.block_size
        slots = [
            span.block_table[(span.context_len - 1) // size] * size + (span.context_len - 1) % size
            for span in self.decodes
        ]
        for span in self.prefills:
            table = span.block_table
            positions = range(span.context_len - span.num_rows, span.context_len)
            slots += [table[position // size] * size + position % size for position in positions]
        return slots


def cut_tiles(num_rows: list[int], rows_per_tile: int) -> tuple[list[int], list[int]]:
    """The span and first row of each tile; late tiles see the most context and come first."""
    tiles = [(span, offset) for span, rows in enumerate(num_rows) for offset in range(0, rows, rows_per_tile)]
    tiles.sort(key=lambda tile: -tile[1])
    return [span for span, _ in tiles], [offset for _, offset in tiles]
