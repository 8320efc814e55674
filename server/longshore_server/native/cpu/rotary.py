"""Cosines and sines of positions, computed once by the model's own rotary embedding."""

from __future__ import annotations

from typing import Any

import torch

# Computed in pieces of this many positions, whichever are asked for first: torch may round the end of a
# tensor otherwise than its middle.
PIECE_POSITIONS = 1024


class RotaryTable:
    """`cosines` and `sines` [positions, head_dim / 2] in float32, which grow as positions are asked for."""

    def __init__(self, rotary_emb: Any, head_dim: int, limit: int) -> None:
        """No position at `limit` or behind it is ever computed: some kinds of RoPE change for all by that."""
        self._rotary_emb = rotary_emb
        self._limit = limit
        self.cosines = torch.empty(0, head_dim // 2)
        self.sines = torch.empty(0, head_dim // 2)
        self.num_positions = 0

    def cover(self, num_positions: int) -> None:
        """Makes sure that the first `num_positions` are there."""
        if num_positions > self.num_positions:
            self._grow(num_positions)

    @torch.inference_mode()
    def _grow(self, num_positions: int) -> None:
        cosines, sines = [self.cosines], [self.sines]
        for start in range(self.cosines.shape[0], num_positions, PIECE_POSITIONS):
            both = _halves(self._rotary_emb, start, min(PIECE_POSITIONS, self._limit - start))
            cosines.append(both[0])
            sines.append(both[1])
        self.cosines, self.sines = torch.cat(cosines), torch.cat(sines)
        self.num_positions = self.cosines.shape[0]


@torch.inference_mode()
def is_half_and_half(rotary_emb: Any) -> bool:
    """Whether both halves of a head turn by the same angles, as the kernels have it."""
    both = rotary_emb(torch.zeros(1), torch.arange(4)[None])
    return all(each.shape[-1] % 2 == 0 and torch.equal(*each.chunk(2, dim=-1)) for each in both)


def _halves(rotary_emb: Any, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    positions = torch.arange(start, start + count)[None]
    cosines, sines = (each[0].float().chunk(2, dim=-1)[0] for each in rotary_emb(torch.zeros(1), positions))
    return cosines.contiguous(), sines.contiguous()
