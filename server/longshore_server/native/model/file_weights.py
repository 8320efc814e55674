"""Fills a model's parts from a folder's safetensors files, when its names are those of the model's class.

Names are checked before anything is read. Checkpoints that transformers has to convert are left to it.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import TracebackType

import torch
from torch import nn
from transformers import PreTrainedModel

from longshore_server.native.errors import ModelLoadError
from longshore_server.native.model.materialize import Owners, parts
from longshore_server.native.model.safetensors_index import Place, locate
from longshore_server.native.model.stream import WeightStream

# Computed from the config today; older checkpoints carry them along.
COMPUTED = re.compile(r".*rotary_emb\.inv_freq")


class FileWeights:
    """A source of weights, to be filled in the order of `materialize.parts`; a context manager."""

    def __init__(self, model: PreTrainedModel, folder: Path, device: torch.device) -> None:
        self._places = _resolve(model, folder, locate(folder))
        self._owners = Owners(model)
        self._stream = WeightStream(self._places, device)
        self._order = [list(parameters) for _, parameters in parts(model)]
        self._started = 0

    def __enter__(self) -> FileWeights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.__exit__(kind, error, trace)

    def fill(self, parameters: dict[str, nn.Parameter]) -> None:
        """Gives one part its weights in the model's dtype, while the next part is being read."""
        current = self._order.index(list(parameters))
        while self._started < min(current + 2, len(self._order)):
            self._stream.start(str(self._started), self._order[self._started])
            self._started += 1
        tensors = self._stream.take(str(current))
        for name, parameter in parameters.items():
            self._owners.replace(parameter, tensors.pop(name).to(parameter.dtype))


def has_own_names(model: PreTrainedModel, folder: Path) -> bool:
    """Whether the folder calls the weights what the model's class calls them.

    A checkpoint that both lacks names and has others may only be in another form (experts apart, say).
    """
    places = locate(folder)
    aliases = _aliases(model).values()
    lacks_some = any(not any(name in places for name in names) for names in aliases)
    return not (lacks_some and _unexpected(model, places))


def _resolve(model: PreTrainedModel, folder: Path, places: dict[str, Place]) -> dict[str, Place]:
    """The place of each parameter by its first name; raises ModelLoadError for names that differ."""
    found: dict[str, Place] = {}
    missing: list[str] = []
    for parameter, aliases in _aliases(model).items():
        present = next((name for name in aliases if name in places), None)
        if present is None:
            missing.append(aliases[0])
        elif places[present].shape != tuple(parameter.shape):
            shapes = f"{list(places[present].shape)}, not {list(parameter.shape)}"
            raise ModelLoadError(f"{folder} has {present} in the shape {shapes}")
        else:
            found[aliases[0]] = places[present]
    if missing:
        raise ModelLoadError(f"{folder} lacks {len(missing)} weights, among them {min(missing)}")
    if unexpected := _unexpected(model, places):
        raise ModelLoadError(
            f"{folder} has {len(unexpected)} weights that the model does not, among them {unexpected[0]}"
        )
    return found


def _aliases(model: PreTrainedModel) -> dict[nn.Parameter, list[str]]:
    """Every parameter and its names: tied ones have several."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return names


def _unexpected(model: PreTrainedModel, places: dict[str, Place]) -> list[str]:
    """The names that mean nothing to the model, sorted."""
    known = {name for names in _aliases(model).values() for name in names} | set(dict(model.named_buffers()))
    ignored = [COMPUTED, *(re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ())]
    return sorted(
        name for name in places.keys() - known if not any(pattern.search(name) for pattern in ignored)
    )
