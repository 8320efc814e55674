"""Seeded random weights in the model's own initial distribution, made on the device itself, part by part."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel

from longshore_server.native.model.materialize import Owners


class RandomWeights:
    """Fills parts of a model; the same seed gives the same weights on the same kind of device."""

    def __init__(self, model: PreTrainedModel, device: torch.device, seed: int) -> None:
        self._model = model
        self._owners = Owners(model)
        self._device = device
        self._seed = seed
        self._count = 0

    def fill(self, parameters: dict[str, nn.Parameter]) -> None:
        """Gives one part memory and values."""
        modules: dict[nn.Module, None] = {}
        for name, parameter in parameters.items():
            self._owners.replace(parameter, torch.empty_like(parameter, device=self._device))
            modules[self._model.get_submodule(name.rpartition(".")[0])] = None
        self._count += 1
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            torch.manual_seed((self._seed + self._count * 0x9E3779B97F4A7C15) % 2**63)
            self._initialize(modules)

    def _initialize(self, modules: Iterable[nn.Module]) -> None:
        for module in modules:
            self._model._init_weights(module)
