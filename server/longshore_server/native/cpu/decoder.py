"""A model of a known family in the form that the compiled kernels run: packed weights, and pointers to them.

It takes the weights over, layer by layer, so that no more than one layer exists in both forms.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from longshore_server.native.attention.kv_cache import LayerGeometry, PagedKVCache
from longshore_server.native.cpu import structs
from longshore_server.native.cpu.packing import (
    LANES,
    address,
    pack_gate_up,
    pack_linears,
    storage_kind,
)
from longshore_server.native.cpu.rotary import RotaryTable, is_half_and_half
from longshore_server.native.model import fuse


class CompiledLayer:
    """One layer's packed weights."""

    def __init__(self, library: ctypes.CDLL, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._qkv = pack_linears(library, [getattr(attention, name) for name in fuse.PROJECTIONS])
        self._output = pack_linears(library, [attention.o_proj])
        self._gate_up = pack_gate_up(library, mlp.gate_proj, mlp.up_proj)
        self._down = pack_linears(library, [mlp.down_proj])
        self._norms = [
            None if norm is None else norm.weight.detach().float().contiguous()
            for norm in (
                layer.input_layernorm,
                layer.post_attention_layernorm,
                getattr(attention, "q_norm", None),
                getattr(attention, "k_norm", None),
            )
        ]
        self.struct = structs.Layer(
            *(address(norm) for norm in self._norms),
            *(each.struct for each in (self._qkv, self._output, self._gate_up, self._down)),
            window=fuse.window_of(attention) or 0,
            scale=attention.scaling,
        )


class CompiledDecoder:
    """All of a causal language model that `can_compile`; `attach` it to a KV cache before it runs."""

    def __init__(self, library: ctypes.CDLL, model: PreTrainedModel, max_model_len: int) -> None:
        self.kernels = library
        decoder: Any = model.model
        first = decoder.layers[0]
        attention = first.self_attn
        self.vocab_size: int = model.lm_head.weight.shape[0]  # type: ignore[union-attr]
        self.rotary = RotaryTable(decoder.rotary_emb, attention.head_dim, max_model_len)
        self._embedding = _embedding(decoder.embed_tokens.weight.detach())
        self._head = pack_linears(library, [model.lm_head])  # type: ignore[list-item]
        self._final_norm = decoder.norm.weight.detach().float().contiguous()
        self.struct = structs.Model(
            num_layers=len(decoder.layers),
            hidden=first.mlp.gate_proj.in_features,
            inner=first.mlp.gate_proj.out_features,
            num_heads=attention.q_proj.out_features // attention.head_dim,
            num_kv_heads=attention.k_proj.out_features // attention.head_dim,
            head_dim=attention.head_dim,
            eps=decoder.norm.variance_epsilon,
            qk_eps=getattr(getattr(attention, "q_norm", None), "variance_epsilon", 0.0),
            embedding=self._embedding.data_ptr(),
            embedding_kind=structs.FLOAT32 if self._embedding.dtype == torch.float32 else structs.BFLOAT16,
            final_norm=self._final_norm.data_ptr(),
            head=self._head.struct,
        )
        self._layers = []
        for index, layer in enumerate(decoder.layers):
            self._layers.append(CompiledLayer(library, layer))
            decoder.layers[index] = nn.Identity()
        self._structs = (structs.Layer * len(self._layers))(*(layer.struct for layer in self._layers))
        self.struct.layers = self._structs

    def attach(self, cache: PagedKVCache) -> None:
        """Lets steps write to `cache`. Inside a block the order is the kernels' own: heads before tokens,
        and a key's numbers apart, so that those of neighbouring tokens stand side by side.
        """
        self._cache = cache
        self.struct.block_size = cache.block_size
        for struct, keys, values in zip(self._structs, cache.keys, cache.values, strict=True):
            struct.keys, struct.values = keys.data_ptr(), values.data_ptr()


def can_compile(model: PreTrainedModel, geometries: list[LayerGeometry]) -> bool:
    """Whether every part of the model is one that the kernels know, and all is float32 on the CPU."""
    if type(model).__name__ not in {f"{family}ForCausalLM" for family in fuse.FAMILIES}:
        return False
    if not fuse.can_fuse(model) or len(set(geometries)) != 1:
        return False
    decoder: Any = model.model
    linears = [model.lm_head]
    for layer in decoder.layers:
        linears += [layer.self_attn.o_proj, layer.mlp.down_proj]
    return (
        all(type(each) is nn.Linear for each in linears)
        and type(decoder.embed_tokens) is nn.Embedding
        and all(p.dtype == torch.float32 and p.device.type == "cpu" for p in model.parameters())
        and all(layer.mlp.gate_proj.out_features % LANES == 0 for layer in decoder.layers)
        and is_half_and_half(decoder.rotary_emb)
    )


def _embedding(weight: torch.Tensor) -> torch.Tensor:
    return weight.bfloat16() if storage_kind(weight) == structs.BFLOAT16 else weight.contiguous()
