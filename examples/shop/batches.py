"""Turns shards on disk into training batches on the device: token ids, positions and labels.

Reads shards that data.py wrote and waits, with a deadline, for one still being written. Never makes text.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shop.data import LARGEST_SHEET, Curriculum, shard_path

IGNORED = -100
SHARD_DEADLINE_S = 120.0


@dataclass(frozen=True, slots=True)
class Markers:
    """Token ids that the labels are found by."""

    end: int
    assistant: int
    others: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """[rows, tokens] each; `labels` holds the next token inside an answer and IGNORED elsewhere."""

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor


def answer_labels(input_ids: Tensor, markers: Markers) -> Tensor:
    """Next-token labels where the next token belongs to an answer, its end token included."""
    special = torch.tensor([markers.end, markers.assistant, *markers.others], device=input_ids.device)
    index = torch.arange(input_ids.shape[1], device=input_ids.device)
    last_marker = torch.where(torch.isin(input_ids, special), index, 0).cummax(dim=1).values
    in_answer = input_ids.gather(1, last_marker) == markers.assistant
    following = input_ids.roll(-1, dims=1)
    labels = following.masked_fill(~in_answer, IGNORED)
    labels[:, -1] = IGNORED
    return labels


def gapped_positions(input_ids: Tensor, user: int, max_position: int, generator: torch.Generator) -> Tensor:
    """Positions with a random jump after the sheet in half of the rows: short rows teach long distances."""
    rows, tokens = input_ids.shape
    device = input_ids.device
    index = torch.arange(tokens, device=device)
    first_user = (input_ids == user).int().argmax(dim=1, keepdim=True)
    draw = torch.rand(3, rows, 1, generator=generator, device=device)
    start = first_user + draw[0].square() * (tokens - first_user)
    gap = (draw[1] * (max_position - tokens)).long() * (draw[2] < 0.5)
    return index + gap * (index >= start)


class Batches:
    """Batch number `step` of a run, the same for the same seed, whatever was asked before."""

    def __init__(
        self,
        folder: Path,
        num_shards: int,
        rows: int,
        markers: Markers,
        max_position: int,
        seed: int,
        device: str,
    ):
        self.folder, self.num_shards, self.rows, self.device = folder, num_shards, rows, device
        self.markers, self.max_position, self.seed = markers, max_position, seed
        self._shards: dict[int, Tensor] = {}
        self._generator = torch.Generator(device=device)
        self._load(0)  # waits for the writer, whose curriculum is there before its first shard
        max_items = Curriculum.of(folder).max_items
        self.full_shards = [shard for shard in range(num_shards) if max_items(shard) == LARGEST_SHEET] or [0]

    def shard_at(self, step: int) -> tuple[int, int, int]:
        """(epoch, shard, first row): the curriculum once, then the full-size shards over and over."""
        batches_per_shard = self._load(0).shape[0] // self.rows
        turn, batch = divmod(step, batches_per_shard)
        if turn < self.num_shards:
            return 0, turn, batch * self.rows
        epoch, place = divmod(turn - self.num_shards, len(self.full_shards))
        return epoch + 1, self.full_shards[place], batch * self.rows

    def __call__(self, step: int) -> Batch:
        epoch, shard, first = self.shard_at(step)
        tokens = self._load(shard)
        order = np.random.default_rng([self.seed, epoch, shard]).permutation(tokens.shape[0])
        chosen = torch.from_numpy(order[first : first + self.rows]).to(self.device)
        input_ids = tokens[chosen].long()
        self._generator.manual_seed(self.seed * 1_000_003 + step)
        user = self.markers.others[-1]
        positions = gapped_positions(input_ids, user, self.max_position, self._generator)
        return Batch(input_ids, positions, answer_labels(input_ids, self.markers))

    def _load(self, shard: int) -> Tensor:
        if shard not in self._shards:
            path = shard_path(self.folder, shard)
            give_up_at = time.monotonic() + SHARD_DEADLINE_S
            while not path.exists():
                if time.monotonic() > give_up_at:
                    raise TimeoutError(f"no {path.name} in {path.parent} after {SHARD_DEADLINE_S:.0f} s")
                time.sleep(0.1)
            self._shards[shard] = torch.from_numpy(np.load(path)).to(self.device)
        return self._shards[shard]
