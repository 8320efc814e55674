"""What the batch-invariant mode of a GPU asks for, how a model is built for it, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, MixtralConfig, PreTrainedConfig, Qwen3Config, SmolVLMConfig

from longshore_server.native import EngineConfig
from longshore_server.native.attention import interface
from longshore_server.native.errors import ConfigError
from longshore_server.native.gemm.multiply import multiply_invariant
from longshore_server.native.model.build import LayerFinisher
from longshore_server.native.model.materialize import build_on_meta
from longshore_server.native.model.products import Fp8Product, GemmLinear, PlainProduct

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}


def _config(**settings) -> EngineConfig:
    return EngineConfig(**{"model": "m", "device": "cuda", "batch_invariant": True, **settings})


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"device": "cuda:1", "dtype": "bfloat16"},
        {"dtype": "float16", "fuse_layers": True},
        {"quantization": "fp8"},
        {"kv_cache_dtype": "fp8"},
        {"quantization": "fp8", "kv_cache_dtype": "fp8"},
    ],
    ids=str,
)
def test_one_gpu_may_be_asked_for_it(settings) -> None:
    assert _config(**settings).has_invariant_kernels
    assert not _config(**settings, batch_invariant=None).has_invariant_kernels
    assert not _config(**settings, batch_invariant=False).has_invariant_kernels


@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": "float32"},
        {"fuse_layers": False},
        {"tensor_parallel_size": 2},
        {"placement": "attention_feed_forward"},
        {"attention_sparsity": "window=8"},
        {"device": "cpu", "dtype": "bfloat16"},
        {"device": "cpu", "quantization": "fp8"},
        {"device": "cpu", "kv_cache_dtype": "fp8"},
    ],
    ids=str,
)
def test_settings_that_cannot_have_it_are_refused(settings) -> None:
    with pytest.raises(ConfigError, match="batch_invariant") as caught:
        _config(**settings)
    assert caught.value.field == "batch_invariant"


def _finisher(hf_config: PreTrainedConfig, dtype: torch.dtype = torch.bfloat16, **settings):
    interface.register()
    model = build_on_meta(hf_config, dtype)
    return model, LayerFinisher(model, _config(**settings))


@pytest.mark.parametrize("quantization", ["none", "fp8"])
@pytest.mark.parametrize("make", [LlamaConfig, Qwen3Config])
def test_every_product_of_the_model_is_invariant(make, quantization) -> None:
    model, finisher = _finisher(make(**SIZES), quantization=quantization)
    for index in range(2):
        finisher.finish_layer(index)
    finisher.finish_model()
    products = [each for each in model.modules() if isinstance(each, PlainProduct | Fp8Product)]
    assert len(products) == 2 * 4 and all(each.gemm is multiply_invariant for each in products)
    assert isinstance(model.lm_head, GemmLinear) and model.lm_head.gemm is multiply_invariant
    assert not any(isinstance(each, nn.Linear) for each in model.modules())


def test_a_head_that_is_tied_shares_its_weight() -> None:
    model, finisher = _finisher(LlamaConfig(**SIZES, tie_word_embeddings=True))
    finisher.finish_model()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_models_without_kernels_for_all_of_them_are_refused() -> None:
    seeing = SmolVLMConfig(text_config={"model_type": "llama", **SIZES, "pad_token_id": 0})
    for hf_config, dtype, reason in (
        (LlamaConfig(**SIZES), torch.float32, "float32"),
        (MixtralConfig(**SIZES, num_local_experts=2), torch.bfloat16, "not fused"),
        (LlamaConfig(**SIZES, hidden_act="relu"), torch.bfloat16, "not fused"),
        (seeing, torch.bfloat16, "that see"),
    ):
        with pytest.raises(ConfigError, match=f"batch_invariant.*{reason}"):
            _finisher(hf_config, dtype)
