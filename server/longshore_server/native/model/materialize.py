"""From a model on the meta device to one with memory: part by part, ties kept, computed buffers filled in.

It decides no value of a weight; sources (seeded random numbers, files) do.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from longshore_server.native.attention import interface
from longshore_server.native.model.vision import build_seeing, is_seeing, language_part


def build_on_meta(hf_config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model's class with shapes only."""
    with torch.device("meta"):
        if is_seeing(hf_config):
            return build_seeing(hf_config, dtype)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            hf_config, dtype=dtype, attn_implementation=interface.ATTENTION_NAME, trust_remote_code=False
        )
    return model


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The list of layers that is as long as the config says; an empty list where there is none."""
    count = model.config.get_text_config().num_hidden_layers
    for module in language_part(model).modules():
        layers = getattr(module, "layers", None)
        if isinstance(layers, nn.ModuleList) and len(layers) == count:
            return layers
    return nn.ModuleList()


def parts(model: PreTrainedModel) -> Iterator[tuple[str, dict[str, nn.Parameter]]]:
    """The meta parameters in the order they are to be filled: one layer after the other, then the rest.

    Each part has a label; a parameter that several modules share appears once, under its first name.
    """
    layers = decoder_layers(model)
    prefix = next((name for name, module in model.named_modules() if module is layers), "")
    labels = [*(f"{prefix}.{index}" for index in range(len(layers))), ""]
    by_part: dict[str, dict[str, nn.Parameter]] = {label: {} for label in labels}
    for name, parameter in model.named_parameters():
        inside = name[len(prefix) + 1 :].partition(".")[0] if name.startswith(f"{prefix}.") else ""
        by_part[f"{prefix}.{inside}" if inside else ""][name] = parameter
    yield from by_part.items()


class Owners:
    """Which modules hold each parameter, so that a shared one gets its memory in all of them at once."""

    def __init__(self, model: nn.Module) -> None:
        self._places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                self._places.setdefault(parameter, []).append((module, name))

    def replace(self, parameter: nn.Parameter, tensor: torch.Tensor) -> None:
        """Puts `tensor` where the meta `parameter` stood."""
        filled = nn.Parameter(tensor, requires_grad=False)
        for module, name in self._places.pop(parameter):
            setattr(module, name, filled)


def fill_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Computes the buffers that no checkpoint holds (RoPE frequencies), on the CPU as the classes do."""
    for module in model.modules():
        names = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name in names:
            module._buffers[name] = torch.empty_like(module._buffers[name], device=device)
        if names:
            for parameter in module.parameters(recurse=False):
                parameter._is_hf_initialized = True  # or transformers would draw it anew
            model._init_weights(module)
