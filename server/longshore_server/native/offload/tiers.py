"""Opens the memories that `kv_swap` names: all of a tier for one rank, an even part for each of several."""

from __future__ import annotations

from collections.abc import Sequence

from longshore_server.native.offload.file_memory import FileMemory
from longshore_server.native.offload.memory import HostMemory, Memory, check_host_has
from longshore_server.native.offload.spec import TierSpec
from longshore_server.native.ranks.links import RankLinks


def open_tiers(
    tiers: Sequence[TierSpec], unit_bytes: int, *, pinned: bool, links: RankLinks | None = None
) -> list[Memory]:
    """Raises ConfigError. With `links` every rank that has a KV cache calls it, and a tier has as many places
    on each of them as on the one where it has the fewest.
    """
    rank, num_ranks = (0, 1) if links is None else (links.rank, links.num_ranks)
    memories = [_open(tier, unit_bytes, pinned, rank, num_ranks) for tier in tiers]
    if links is not None:
        for memory in memories:
            memory.num_places = links.smallest(memory.num_places)
    return memories


def _open(tier: TierSpec, unit_bytes: int, pinned: bool, rank: int, num_ranks: int) -> Memory:
    num_bytes = tier.num_bytes // num_ranks
    if tier.path is not None:
        return FileMemory(tier.path, num_bytes, unit_bytes, rank=rank)
    check_host_has(tier.num_bytes)
    return HostMemory(num_bytes, unit_bytes, pinned=pinned)
