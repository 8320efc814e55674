"""What a rank that does not schedule runs: its share of the model behind a few calls. It samples nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from longshore_server.native.config import EngineConfig
from longshore_server.native.errors import RankProtocolError
from longshore_server.native.model import cpu_linear
from longshore_server.native.model.load import load_model
from longshore_server.native.model.placement import FeedForwardRunner, rank_device
from longshore_server.native.offload.shard_store import ShardStore
from longshore_server.native.ranks.links import RankLinks
from longshore_server.native.ranks.mirror import StepReader
from longshore_server.native.runner import ModelRunner, Runner
from longshore_server.native.scheduler import Chunk
from longshore_server.native.startup import build

PROBE_ROWS = 1


class Share(Protocol):
    """One rank's part of every step."""

    links: RankLinks

    def run_step(self, chunks: Sequence[Chunk]) -> None: ...
    def mirror_step(self, payload: bytes) -> None: ...
    def clear_blocks(self, blocks: Sequence[int]) -> None: ...

    @property
    def store(self) -> ShardStore: ...  # raises RankProtocolError where no blocks are moved


class _CachingShare:
    """A slice of every layer, with the KV cache of its heads and what of it is kept elsewhere."""

    def __init__(self, runner: Runner, links: RankLinks, store: ShardStore | None) -> None:
        self.links = links
        self._runner = runner
        self._store = store

    def clear_blocks(self, blocks: Sequence[int]) -> None:
        self._runner.clear_blocks(blocks)

    @property
    def store(self) -> ShardStore:
        if self._store is None:
            raise RankProtocolError("blocks to move, and no memory to move them to")
        return self._store


class TensorShare(_CachingShare):
    """A share that runs each step to its end."""

    def run_step(self, chunks: Sequence[Chunk]) -> None:
        cast(ModelRunner, self._runner).run_without_sampling(chunks)

    def mirror_step(self, payload: bytes) -> None:
        raise RankProtocolError("a step for GPUs, on a rank that runs steps one by one")


class MirroringShare(_CachingShare):
    """A share on a GPU of its own: it launches what the first rank launches, never waiting."""

    def __init__(self, runner: Runner, links: RankLinks, store: ShardStore | None) -> None:
        super().__init__(runner, links, store)
        self._reader = StepReader()

    def run_step(self, chunks: Sequence[Chunk]) -> None:
        raise RankProtocolError("a step without settings, on a rank that draws its own tokens")

    def mirror_step(self, payload: bytes) -> None:
        self._runner.launch(self._reader.read(payload))


class FeedForwardShare:
    """The feed-forward blocks of every layer; it caches nothing."""

    def __init__(self, runner: FeedForwardRunner) -> None:
        self.links = runner.links
        self._runner = runner

    def run_step(self, chunks: Sequence[Chunk]) -> None:
        self._runner.run_rows(sum(chunk.num_tokens for chunk in chunks))

    def mirror_step(self, payload: bytes) -> None:
        raise RankProtocolError("a step for GPUs, on a rank without attention")

    def clear_blocks(self, blocks: Sequence[int]) -> None:
        pass

    @property
    def store(self) -> ShardStore:
        raise RankProtocolError("blocks to move, on a rank without KV")


def make_share(settings: dict[str, Any], rank: int, store_path: Path, num_threads: int) -> Share:
    """Builds this rank's share from the first rank's settings; raises what a start may raise."""
    torch.set_num_threads(num_threads)
    device = rank_device(settings["device"], rank)
    is_nccl = settings["device"] == "cuda"
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()
    }
    config = EngineConfig(**(values | {"device": device}))
    links = RankLinks(rank, config.num_ranks, store_path, torch.device(device), nccl=is_nccl)
    if config.placement == "tensor_parallel":
        built = build(config, links)
        make = MirroringShare if built.runner.overlaps else TensorShare
        return make(built.runner, links, built.shard_store)
    return FeedForwardShare(_feed_forward(config, links))


def _feed_forward(config: EngineConfig, links: RankLinks) -> FeedForwardRunner:
    model = load_model(config, links).model
    runner = FeedForwardRunner(model, links)
    if config.may_be_batch_invariant and cpu_linear.is_available():
        cpu_linear.pack_linears(model)
    runner.run_rows(PROBE_ROWS)  # the first rank learns its KV geometry from one token
    links.smallest(2**62)  # the first rank asks how many KV blocks fit: any number does here
    return runner
