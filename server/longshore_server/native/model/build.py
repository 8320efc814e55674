"""A model of one rank from shapes to weights: filled part by part, each layer fused and quantized at once.

So no more than one layer at a time exists in another form than the one that serves.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from longshore_server.native.attention import interface
from longshore_server.native.config import EngineConfig
from longshore_server.native.errors import ConfigError, ModelLoadError
from longshore_server.native.gemm.multiply import gemm_for, multiply_by_torch
from longshore_server.native.gemm.plans import Product, dtype_name
from longshore_server.native.model import fuse, products
from longshore_server.native.model.file_weights import FileWeights, has_own_names
from longshore_server.native.model.first_layer import first_layer_alone
from longshore_server.native.model.materialize import build_on_meta, decoder_layers, fill_buffers, parts
from longshore_server.native.model.random_weights import RandomWeights
from longshore_server.native.model.vision import is_seeing, language_model

# Told of a model of the first layer alone, as soon as that layer is in the form that serves.
OnFirstLayer = Callable[[PreTrainedModel], None]


class WeightSource(Protocol):
    """Gives memory and values to one part of a model after the other."""

    def fill(self, parameters: dict[str, nn.Parameter]) -> None: ...


class LayerFinisher:
    """Brings each filled layer into the form that serves: fused, in FP8, or as it is.

    Raises ConfigError where a GPU is to be batch-invariant and has no kernels for all of the model.
    """

    def __init__(self, model: PreTrainedModel, config: EngineConfig) -> None:
        self._to_fp8 = config.quantization == "fp8"
        self._model = language_model(model)
        self.fuses = config.fuses_layers and fuse.can_fuse(self._model)
        self._layers = decoder_layers(model)
        if config.has_invariant_kernels:
            _check_invariant(model, self.fuses)
        self._gemm = gemm_for(config) if self.fuses else multiply_by_torch
        self._is_whole = config.num_ranks == 1  # ranks share the head out, and meet behind it

    def finish_layer(self, index: int) -> None:
        """Call it once the layer has its weights."""
        if self.fuses:
            self._layers[index] = fuse.fuse_layer(self._layers[index], self._to_fp8, self._gemm)
        elif self._to_fp8:
            products.replace_linears(self._layers[index])

    def finish_model(self) -> None:
        """Call it after the last layer."""
        if self.fuses:
            fuse.fuse_decoder(self._model)
        if self._multiplies_head:
            products.multiply_linears_by(self._model, self._gemm)

    @property
    def _multiplies_head(self) -> bool:
        return self._gemm is not multiply_by_torch and self._is_whole

    def first_layer_alone(self, device: torch.device) -> PreTrainedModel:
        """For a model that it fuses, once the first layer is finished."""
        return first_layer_alone(self._model, device, self._gemm if self._multiplies_head else None)


def _check_invariant(model: PreTrainedModel, is_fused: bool) -> None:
    """Transformers' own modules will not do: torch sums a norm by the number of rows."""
    reason = None
    if is_seeing(model.config):
        reason = "models that see"
    elif not is_fused:
        reason = "layers that are not fused"
    elif model.dtype not in (torch.bfloat16, torch.float16):
        reason = "weights in float32"
    if reason is not None:
        raise ConfigError("batch_invariant", f"cannot be had on a GPU with {reason}")


def planned_products(hf_config: PreTrainedConfig, dtype: torch.dtype, config: EngineConfig) -> list[Product]:
    """The different products of a model whose layers are fused, by its shapes alone; none where they are not.

    Those with a bias are left out: no table holds them.
    """
    model = build_on_meta(hf_config, dtype)
    finisher = LayerFinisher(model, config)
    for index in range(len(decoder_layers(model))):
        finisher.finish_layer(index)
    finisher.finish_model()
    kinds = (products.PlainProduct, products.Fp8Product, products.GemmLinear)
    weights = [each.weight for each in model.modules() if isinstance(each, kinds) and each.bias is None]
    names = (Product(dtype_name(each.dtype), *each.shape) for each in weights)
    return list(dict.fromkeys(names))


def build_random(
    hf_config: PreTrainedConfig,
    dtype: torch.dtype,
    config: EngineConfig,
    on_first_layer: OnFirstLayer | None,
) -> PreTrainedModel:
    """Seeded weights, made on the device itself; no file is read."""
    model = build_on_meta(hf_config, dtype)
    device = torch.device(config.device)
    return _fill(model, RandomWeights(model, device, config.seed), device, config, on_first_layer)


def build_from_files(
    folder: Path,
    hf_config: PreTrainedConfig,
    dtype: torch.dtype,
    config: EngineConfig,
    on_first_layer: OnFirstLayer | None,
) -> PreTrainedModel:
    """The folder's safetensors; raises ModelLoadError for weights that are damaged, missing or too much."""
    model = build_on_meta(hf_config, dtype)
    if not has_own_names(model, folder) and not is_seeing(hf_config):
        return _convert(folder, hf_config, dtype, config)
    device = torch.device(config.device)
    with FileWeights(model, folder, device) as source:
        return _fill(model, source, device, config, on_first_layer)


@torch.no_grad()
def _fill(
    model: PreTrainedModel,
    source: WeightSource,
    device: torch.device,
    config: EngineConfig,
    on_first_layer: OnFirstLayer | None,
) -> PreTrainedModel:
    finisher = LayerFinisher(model, config)
    for index, (_, parameters) in enumerate(parts(model)):
        source.fill(parameters)
        if index < len(decoder_layers(model)):
            finisher.finish_layer(index)
        if index == 0 and finisher.fuses and on_first_layer is not None:
            on_first_layer(finisher.first_layer_alone(device))
    fill_buffers(model, device)
    finisher.finish_model()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the KV cache is sized by what the device has free
    return model


@torch.no_grad()
def _convert(
    folder: Path, hf_config: PreTrainedConfig, dtype: torch.dtype, config: EngineConfig
) -> PreTrainedModel:
    """Checkpoints in another form than the class has (experts apart, say): transformers converts."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        config=hf_config,
        dtype=dtype,
        attn_implementation=interface.ATTENTION_NAME,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
    )
    if missing := sorted(info["missing_keys"]):
        raise ModelLoadError(f"{folder} lacks {len(missing)} weights, among them {missing[0]}")
    device = torch.device(config.device)
    finisher = LayerFinisher(model, config)
    for index, layer in enumerate(decoder_layers(model)):
        layer.to(device)
        finisher.finish_layer(index)
    finisher.finish_model()
    return model.to(device)  # type: ignore[no-any-return]
