"""Learns a model's KV geometry from one forward pass, and refuses models whose attention we cannot do.

The keys and values that reach the attention say what has to be cached, for any architecture; no config
field has to be guessed. It caches nothing.
"""

from __future__ import annotations

from typing import Any

import torch

from longshore_server.native.attention.interface import CONTEXT_KEYWORD
from longshore_server.native.attention.kv_cache import LayerGeometry
from longshore_server.native.errors import UnsupportedModelError

REFUSED_ARGUMENTS = ("softcap", "s_aux", "position_bias", "indices", "block_indices")


class ProbeContext:
    """An attention context that notes geometries and answers with zeros."""

    def __init__(self) -> None:
        self.geometries: dict[int, LayerGeometry] = {}

    def attend(
        self,
        layer_index: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        geometry = LayerGeometry(key.shape[1], key.shape[2], value.shape[2])
        if self.geometries.setdefault(layer_index, geometry) != geometry:
            raise UnsupportedModelError(f"layer {layer_index} attends twice with different shapes")
        return value.new_zeros(*query.shape[:2], value.shape[2])

    def check_arguments(self, arguments: dict[str, Any], attention_mask: torch.Tensor | None) -> None:
        for name in REFUSED_ARGUMENTS:
            if arguments.get(name) is not None:
                raise UnsupportedModelError(f"its attention needs {name}, which the paged attention lacks")
        if attention_mask is not None:
            raise UnsupportedModelError("its attention needs a mask of its own")


@torch.inference_mode()
def probe_geometries(model: torch.nn.Module, num_layers: int, device: torch.device) -> list[LayerGeometry]:
    """Runs one token through the model; raises UnsupportedModelError unless each layer attends through us."""
    context = ProbeContext()
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    model(input_ids=token, position_ids=token, use_cache=False, **{CONTEXT_KEYWORD: context})
    if sorted(context.geometries) != list(range(num_layers)):
        raise UnsupportedModelError(
            f"{len(context.geometries)} of its {num_layers} layers attend through the interface"
        )
    return [context.geometries[index] for index in range(num_layers)]
