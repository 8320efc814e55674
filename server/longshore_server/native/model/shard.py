"""Fills one rank's share of a model: slices read from safetensors, or cut from seeded random weights.

A rank reads and holds its own slices only. It never runs the model and never talks to another rank.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from longshore_server.native.errors import ModelLoadError
from longshore_server.native.model.materialize import parts
from longshore_server.native.model.random_weights import RandomWeights
from longshore_server.native.model.tensor_parallel import Slice, TensorParallelPlan

# Gives a parameter's slice (the whole of it for None) on the device, in the model's dtype.
TakeSlice = Callable[[str, Slice | None], torch.Tensor]
# Told of each part of `materialize.parts` once it has its weights: its place among them, and its label.
Filled = Callable[[int, str], None]


def fill(model: PreTrainedModel, plan: TensorParallelPlan | None, take: TakeSlice, filled: Filled) -> None:
    """Gives a model on the meta device this rank's weights; raises ModelLoadError when one is missing."""
    for index, (label, parameters) in enumerate(parts(model)):
        for name, parameter in parameters.items():
            if name not in model.all_tied_weights_keys:
                part = plan.slice_of(name, parameter.shape) if plan else None
                _set(model, name, take(name, part), parameter.shape)
        if not label:
            _tie(model, plan)
        filled(index, label)


def fill_random(
    model: PreTrainedModel,
    plan: TensorParallelPlan | None,
    whole: PreTrainedModel,
    device: torch.device,
    seed: int,
    filled: Filled,
) -> None:
    """Cuts this rank's weights out of `whole` (on the meta device), which is drawn and dropped part by part.

    So they are the weights of one rank alone, and no more than one layer is ever there whole.
    """
    source = RandomWeights(whole, device, seed)
    mine = {name for name, _ in model.named_parameters()}
    for index, (label, parameters) in enumerate(parts(whole)):
        source.fill(parameters)
        for name in parameters:
            full = whole.get_parameter(name).data
            if name in mine:
                part = plan.slice_of(name, full.shape) if plan else None
                _set(model, name, part.of(full).clone() if part else full, full.shape)
            module_name, _, kind = name.rpartition(".")
            setattr(whole.get_submodule(module_name), kind, None)
        if not label:
            _tie(model, plan)
        filled(index, label)


def _tie(model: PreTrainedModel, plan: TensorParallelPlan | None) -> None:
    """Gives tied weights (a head that is the token table) this rank's share of what they are tied to."""
    for name, source in dict(model.all_tied_weights_keys).items():
        whole_shape = model.get_parameter(name).shape  # still on the meta device
        weight = model.get_parameter(source).data
        part = plan.slice_of(name, whole_shape) if plan else None
        is_whole = weight.shape == whole_shape
        _set(model, name, part.of(weight) if part and is_whole else weight, whole_shape)


def _set(model: nn.Module, name: str, weight: torch.Tensor, whole_shape: torch.Size) -> None:
    """Puts a weight in its place; a linear layer learns its own sizes, and the whole's number of rows."""
    module_name, _, kind = name.rpartition(".")
    module = model.get_submodule(module_name)
    setattr(module, kind, nn.Parameter(weight, requires_grad=False))
    if kind != "weight":
        return
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
        module.whole_rows = whole_shape[0]  # type: ignore[assignment]
    elif isinstance(module, nn.Embedding):
        module.num_embeddings = weight.shape[0]
        module.padding_idx = None


class SafetensorsSlices:
    """Slices of the weights in a folder, each read from its file's mapping without the rest."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        self._folder = folder
        self._dtype = dtype
        self._device = device
        self._file_of: dict[str, Any] = {}
        self._open_files = ExitStack()
        for path in weight_files(folder):
            file = self._open_files.enter_context(safe_open(path, framework="pt"))
            self._file_of |= dict.fromkeys(file.keys(), file)

    def __enter__(self) -> SafetensorsSlices:
        return self

    def __exit__(self, *_: object) -> None:
        self._open_files.close()

    def __call__(self, name: str, part: Slice | None) -> torch.Tensor:
        if name not in self._file_of:
            raise ModelLoadError(f"{self._folder} lacks the weight {name}")
        source = self._file_of[name].get_slice(name)
        if part is None:
            read = source[:]
        elif part.dim == 0:
            read = source[part.start : part.stop]
        else:
            read = source[:, part.start : part.stop]
        moved = read.to(self._device, self._dtype)
        return (part.padded(moved) if part else moved).contiguous()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that the folder's index names, or all of them."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    names = json.loads(index.read_bytes())["weight_map"].values()
    return sorted({folder / Path(name).name for name in names})
