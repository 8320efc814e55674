"""How a model lies on its ranks: sharded by tensors, or attention on one rank and feed-forward on another.

It builds a rank's share and the modules where ranks meet. It starts no process and schedules nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from longshore_server.native.config import EngineConfig
from longshore_server.native.errors import ConfigError, UnsupportedModelError
from longshore_server.native.model.build import LayerFinisher
from longshore_server.native.model.materialize import build_on_meta, fill_buffers
from longshore_server.native.model.shard import StreamedSlices, fill, fill_random
from longshore_server.native.model.tensor_parallel import TensorParallelPlan, check_heads, connect
from longshore_server.native.model.vision import is_seeing
from longshore_server.native.ranks.links import RankLinks

ATTENTION_RANK = 0
FEED_FORWARD_RANK = 1


def check_ranks(config: EngineConfig, hf_config: Any) -> None:
    """Raises ConfigError or UnsupportedModelError, before any rank is started, when model or machine cannot
    be shared out so.
    """
    if config.device == "cuda" and torch.cuda.device_count() < config.num_ranks:
        raise ConfigError(
            "tensor_parallel_size" if config.placement == "tensor_parallel" else "placement",
            f"{config.num_ranks} ranks need as many GPUs, there are {torch.cuda.device_count()}",
        )
    if is_seeing(hf_config):
        raise UnsupportedModelError(
            f"{hf_config.model_type} takes images, which one rank serves, not several"
        )
    if config.placement == "tensor_parallel":
        check_heads(hf_config, config.num_ranks)


def rank_device(device: str, rank: int) -> str:
    """Each rank has a GPU of its own, unless the setting names one: all ranks share that, for trying out."""
    return f"cuda:{rank}" if device == "cuda" else device


def build_share(
    folder: Path, hf_config: Any, dtype: torch.dtype, config: EngineConfig, links: RankLinks
) -> PreTrainedModel:
    """This rank's share, connected to the others; every rank calls it."""
    device = torch.device(config.device)
    model = build_on_meta(hf_config, dtype)
    plan = None
    if config.placement == "tensor_parallel":
        plan = TensorParallelPlan(model, hf_config, links.rank, links.num_ranks)
    elif links.rank == ATTENTION_RANK:
        _put_feed_forward_elsewhere(model, links)
    else:
        _keep_feed_forward_alone(model)
    finisher = ShareFinisher(model, config, plan, links)
    with torch.no_grad():
        if config.load_format == "random":
            whole = build_on_meta(hf_config, dtype)
            fill_random(model, plan, whole, device, config.seed, finisher.finish_part)
        else:
            with StreamedSlices(model, plan, folder, dtype, device) as weights:
                fill(model, plan, weights, finisher.finish_part)
    fill_buffers(model, device)
    finisher.finish_model()
    return model


class ShareFinisher:
    """Connects each filled part to the other ranks and brings it into the form that serves."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: EngineConfig,
        plan: TensorParallelPlan | None,
        links: RankLinks,
    ) -> None:
        self._model, self._plan, self._links = model, plan, links
        self._finisher = LayerFinisher(model, config)
        self._to_connect = list(plan.styles) if plan is not None else []

    def finish_part(self, index: int, label: str) -> None:
        """Call it once a part has its weights; the label of what is no layer is empty and comes last."""
        mine = [name for name in self._to_connect if not label or name.startswith(f"{label}.")]
        self._to_connect = [name for name in self._to_connect if name not in mine]
        if self._plan is not None:
            connect(self._model, self._plan, self._links, mine)
        if label:
            self._finisher.finish_layer(index)

    def finish_model(self) -> None:
        """Call it after the last part."""
        self._finisher.finish_model()
        if self._links.device.type == "cuda":
            torch.cuda.empty_cache()  # the KV cache is sized by what the device has free


# --- attention and feed-forward apart ---


class RemoteFeedForward(nn.Module):
    """Stands for a layer's feed-forward block on the attention's rank: rows go out, rows come back."""

    def __init__(self, links: RankLinks) -> None:
        super().__init__()
        self._links = links

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        self._links.send(rows, FEED_FORWARD_RANK)
        return self._links.receive(tuple(rows.shape), rows.dtype, FEED_FORWARD_RANK)


class FeedForwardRunner:
    """The feed-forward rank: every layer's block, applied in turn to the rows that the other rank sends."""

    def __init__(self, model: PreTrainedModel, links: RankLinks) -> None:
        self.links = links
        self._blocks = [layer.mlp for layer in _layers(model)]
        self._hidden_size: int = model.config.hidden_size
        self._dtype: torch.dtype = model.config.dtype  # in FP8 no weight has it any more

    @torch.inference_mode()
    def run_rows(self, num_rows: int) -> None:
        """One forward pass of `num_rows` rows."""
        shape = (1, num_rows, self._hidden_size)
        for block in self._blocks:
            rows = self.links.receive(shape, self._dtype, ATTENTION_RANK)
            self.links.send(block(rows), ATTENTION_RANK)


def _layers(model: PreTrainedModel) -> Any:
    layers = getattr(model.base_model, "layers", None)
    if layers is None or not all(isinstance(getattr(layer, "mlp", None), nn.Module) for layer in layers):
        name = model.config.model_type
        raise UnsupportedModelError(f"{name} has no feed-forward blocks that could be placed elsewhere")
    return layers


def _put_feed_forward_elsewhere(model: PreTrainedModel, links: RankLinks) -> None:
    for layer in _layers(model):
        layer.mlp = RemoteFeedForward(links)


def _keep_feed_forward_alone(model: PreTrainedModel) -> None:
    """Leaves the blocks under their own names, for the loader, and nothing else to load."""
    for layer in _layers(model):
        for name, _ in list(layer.named_children()):
            if name != "mlp":
                layer.register_module(name, None)
    for name, _ in list(model.base_model.named_children()):
        if name != "layers":
            model.base_model.register_module(name, None)
    for name, child in list(model.named_children()):
        if child is not model.base_model:
            model.register_module(name, None)
    model.all_tied_weights_keys = {}
