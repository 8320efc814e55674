"""Fills one rank's share of a model: slices read from safetensors, or cut from seeded random weights.

A rank holds its own slices only. It never runs the model and never talks to another rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from longshore_server.native.errors import ModelLoadError
from longshore_server.native.model.materialize import parts
from longshore_server.native.model.random_weights import RandomWeights
from longshore_server.native.model.safetensors_index import Place, locate
from longshore_server.native.model.stream import WeightStream
from longshore_server.native.model.tensor_parallel import Slice, TensorParallelPlan

# Told of each part of `materialize.parts` once it has its weights: its place among them, and its label.
Filled = Callable[[int, str], None]


def fill(
    model: PreTrainedModel, plan: TensorParallelPlan | None, weights: StreamedSlices, filled: Filled
) -> None:
    """Gives a model on the meta device this rank's weights; raises ModelLoadError when one can't be read."""
    for index, (label, parameters) in enumerate(parts(model)):
        for name, tensor in weights.part(index).items():
            _set(model, name, tensor, parameters[name].shape)
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


class StreamedSlices:
    """This rank's slices of the weights in a folder, each part read ahead while the one before is finished.

    Of a slice of rows no other byte is read; one of columns is cut from the whole weight on the device. A
    context manager. Before it reads, it raises ModelLoadError for a weight that is missing or misshapen.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        plan: TensorParallelPlan | None,
        folder: Path,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._dtype = dtype
        self._cuts: dict[str, Slice | None] = {}
        self._parts: list[list[str]] = []
        found, places = locate(folder), {}
        for _, parameters in parts(model):
            self._parts.append([name for name in parameters if name not in model.all_tied_weights_keys])
            for name in self._parts[-1]:
                place = _checked(folder, found, name, parameters[name].shape)
                self._cuts[name] = cut = plan.slice_of(name, parameters[name].shape) if plan else None
                places[name] = _rows_of(place, cut) if cut is not None and cut.dim == 0 else place
        self._stream = WeightStream(places, device)
        self._num_started = 0

    def __enter__(self) -> StreamedSlices:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stream.__exit__(*error)

    def part(self, index: int) -> dict[str, torch.Tensor]:
        """The slices of one of `materialize.parts`, to be asked for in their order."""
        while self._num_started < min(index + 2, len(self._parts)):
            self._stream.start(str(self._num_started), self._parts[self._num_started])
            self._num_started += 1
        read = self._stream.take(str(index))
        return {name: self._cut(self._cuts[name], read.pop(name)) for name in self._parts[index]}

    def _cut(self, cut: Slice | None, read: torch.Tensor) -> torch.Tensor:
        if cut is None:
            return read.to(self._dtype)
        mine = read if cut.dim == 0 else read[:, cut.start : cut.stop]
        return cut.padded(mine.to(self._dtype)).contiguous()


def _checked(folder: Path, found: Mapping[str, Place], name: str, shape: torch.Size) -> Place:
    if name not in found:
        raise ModelLoadError(f"{folder} lacks the weight {name}")
    if found[name].shape != tuple(shape):
        raise ModelLoadError(f"{folder} has {name} in the shape {list(found[name].shape)}, not {list(shape)}")
    return found[name]


def _rows_of(place: Place, cut: Slice) -> Place:
    """Where rows `start` to `stop` of a weight lie."""
    row_bytes = place.num_bytes // place.shape[0]
    return replace(
        place,
        offset=place.offset + cut.start * row_bytes,
        num_bytes=(cut.stop - cut.start) * row_bytes,
        shape=(cut.stop - cut.start, *place.shape[1:]),
    )
