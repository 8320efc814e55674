"""Starts a model on as many ranks as its settings ask for, and hands back the first one's runner."""

from __future__ import annotations

import dataclasses
import weakref
from typing import cast

import torch

from longshore_server.native.config import EngineConfig
from longshore_server.native.errors import ConfigError, ModelLoadError, RanksLostError, UnsupportedModelError
from longshore_server.native.model.load import read_model_config
from longshore_server.native.model.placement import check_ranks, rank_device
from longshore_server.native.ranks.group import OnLost, RankedRunner, RankGroup, start_process
from longshore_server.native.runner import ModelRunner, Runner
from longshore_server.native.startup import BuiltModel, build


def build_on_ranks(
    config: EngineConfig, on_lost: OnLost | None = None
) -> tuple[BuiltModel, RankGroup | None]:
    """A runner over one rank or several; the group of the others, where there are any.

    Raises as build() does. The group ends when its runner is collected, if nobody closed it before.
    """
    if config.num_ranks == 1:
        return build(config), None
    check_ranks(config, read_model_config(config)[1])
    group = RankGroup(config, on_lost=on_lost, start=start_process)
    try:
        built = _build_first(config, group)
    except BaseException:
        group.close()
        raise
    if built.offload is not None and config.placement == "tensor_parallel":
        built.offload.followers = group
    runner = RankedRunner(built.runner, group)
    weakref.finalize(runner, _end, built.runner, group)
    return dataclasses.replace(built, runner=cast(ModelRunner, runner)), group


def _end(first: Runner, group: RankGroup) -> None:
    first.close()
    group.close()


def _build_first(config: EngineConfig, group: RankGroup) -> BuiltModel:
    """The first rank's share; what went wrong on another rank is told as a failure to load."""
    device = rank_device(config.device, 0)
    try:
        links = group.connect(torch.device(device), nccl=config.device == "cuda")
        built = build(dataclasses.replace(config, device=device), links)
        group.wait_ready()
    except (ConfigError, UnsupportedModelError):  # the same on every rank
        raise
    except Exception as error:
        if group.lost is not None or isinstance(error, RanksLostError):
            raise ModelLoadError(group.lost or str(error)) from error
        raise
    return built
