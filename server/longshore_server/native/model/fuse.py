"""Fused decoder layers in place of those of Llama, Qwen2, Qwen3 and Mistral; other layers stay as they are.

A fused decoder hands residual and unscaled product from layer to layer, so that each norm adds, norms and
quantizes in one pass. Keys and values go to the step's attention context, or straight into its pages where it
has them. Behind the last layer's attention only the rows whose logits are wanted go on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from longshore_server.native.attention.interface import (
    CONTEXT_KEYWORD,
    AttentionContext,
    FusedContext,
    QkvProduct,
    SampledRows,
)
from longshore_server.native.attention.kv_cache import LayerGeometry
from longshore_server.native.gemm.multiply import Gemm, multiply_by_torch
from longshore_server.native.model import fused_ops
from longshore_server.native.model.fp8 import ScaledOutput
from longshore_server.native.model.products import make_product

FAMILIES = ("Llama", "Qwen2", "Qwen3", "Mistral")
LAYER_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
ATTENTION_PARTS = {*PROJECTIONS, "o_proj"}
NORM_PARTS = {"q_norm", "k_norm"}
ACTIVATIONS = ("silu", "swish")


class FusedAttention(nn.Module):
    """Merged qkv product, q/k norm and rotary embedding in one pass, attention, output product."""

    def __init__(self, attention: Any, to_fp8: bool, gemm: Gemm) -> None:
        super().__init__()
        self.layer_index: int = attention.layer_idx
        self.head_dim: int = attention.head_dim
        self.num_heads = attention.q_proj.weight.shape[0] // self.head_dim
        self.num_kv_heads = attention.k_proj.weight.shape[0] // self.head_dim
        self.scale: float = attention.scaling
        self.window = window_of(attention)
        self.q_norm, self.k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        projections = [getattr(attention, name) for name in PROJECTIONS]
        self.qkv = make_product(projections, to_fp8, gemm)
        self.output = make_product([attention.o_proj], to_fp8, gemm)

    def forward(
        self,
        rows: Any,
        cos: torch.Tensor,
        sin: torch.Tensor,
        context: AttentionContext,
        only: SampledRows | None,
    ) -> ScaledOutput:
        if isinstance(context, FusedContext):
            attended = self._attend_pages(rows, cos, sin, context, only)
        else:
            heads = _split(self.product(rows, cos, sin))
            attended = context.attend(self.layer_index, *heads, self.scale, self.window)
        return self.output(attended.reshape(attended.shape[0], -1))  # [tokens, hidden]

    def _attend_pages(
        self, rows: Any, cos: torch.Tensor, sin: torch.Tensor, context: FusedContext, only: SampledRows | None
    ) -> torch.Tensor:
        layer = self.layer_index
        product = self.product(rows, cos, sin)
        if only is None and context.takes(layer, product):
            return context.attend_product(layer, product, self.scale, self.window)
        query, key, value = _split(product, target=context.kv_target(layer), keep_rows=context.reads_rows)
        if only is not None:
            return context.attend_sampled(layer, query[only.rows], self.scale, self.window)
        return context.attend_written(layer, query, key, value, self.scale, self.window)

    @property
    def kv_geometry(self) -> LayerGeometry:
        return LayerGeometry(self.num_kv_heads, self.head_dim, self.head_dim)

    def product(self, rows: Any, cos: torch.Tensor, sin: torch.Tensor) -> QkvProduct:
        """What attention takes, before it is split into heads."""
        norms = None
        if self.q_norm is not None and self.k_norm is not None:
            norms = (self.q_norm.weight, self.k_norm.weight, self.q_norm.variance_epsilon)
        return QkvProduct(self.qkv(rows), cos, sin, self.num_heads, self.num_kv_heads, norms)


class FusedMlp(nn.Module):
    """Merged gate and up product, SiLU and multiplication in one pass, down product."""

    def __init__(self, mlp: Any, to_fp8: bool, gemm: Gemm) -> None:
        super().__init__()
        self.dtype = mlp.gate_proj.weight.dtype
        self.gate_up = make_product([mlp.gate_proj, mlp.up_proj], to_fp8, gemm)
        self.down = make_product([mlp.down_proj], to_fp8, gemm)

    def forward(self, rows: Any) -> ScaledOutput:
        return self.down(fused_ops.silu_mul(self.gate_up(rows), self.dtype, self.down.takes_fp8))


class FusedLayer(nn.Module):
    """A decoder layer from the product of the layer before to its own."""

    def __init__(self, layer: Any, to_fp8: bool, gemm: Gemm) -> None:
        super().__init__()
        self.input_layernorm = layer.input_layernorm
        self.post_attention_layernorm = layer.post_attention_layernorm
        self.self_attn = FusedAttention(layer.self_attn, to_fp8, gemm)
        self.mlp = FusedMlp(layer.mlp, to_fp8, gemm)

    def forward(
        self,
        x: ScaledOutput,  # [tokens, hidden]
        residual: torch.Tensor | None,  # [tokens, hidden]
        cos: torch.Tensor,  # [tokens, head_dim]
        sin: torch.Tensor,
        context: AttentionContext,
        only: SampledRows | None = None,
    ) -> tuple[ScaledOutput, torch.Tensor]:
        """With `only`, both results have those rows alone."""
        rows, residual = _norm(self.input_layernorm, x, residual, self.self_attn.qkv.takes_fp8)
        x = self.self_attn(rows, cos, sin, context, only)
        if only is not None:
            residual = residual[only.rows]
        rows, residual = _norm(self.post_attention_layernorm, x, residual, self.mlp.gate_up.takes_fp8)
        return self.mlp(rows), residual


class FusedDecoder(nn.Module):
    """Stands in for the decoder of a causal language model; called as that is, for one row of tokens.

    Where the context names sampled rows, the output has those rows alone.
    """

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        self.embed_tokens = decoder.embed_tokens
        self.layers = decoder.layers
        self.norm = decoder.norm
        self.rotary_emb = decoder.rotary_emb

    @property
    def kv_geometries(self) -> list[LayerGeometry]:
        """Of each layer's keys and values."""
        return [layer.self_attn.kv_geometry for layer in self.layers]

    def forward(
        self,
        input_ids: torch.Tensor | None,  # [1, tokens]
        position_ids: torch.Tensor,  # [1, tokens]
        inputs_embeds: torch.Tensor | None = None,  # [1, tokens, hidden], in place of ids
        **arguments: Any,
    ) -> BaseModelOutputWithPast:
        context: AttentionContext = arguments[CONTEXT_KEYWORD]
        embedded = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        rotary: Any = self.rotary_emb
        cos, sin = fused_ops.rotary_angles(
            position_ids[0], rotary.inv_freq, rotary.attention_scaling, embedded.dtype
        )
        only = context.sampled if isinstance(context, FusedContext) else None
        x, residual = ScaledOutput(embedded[0]), None
        *layers, last = self.layers
        for layer in layers:
            x, residual = layer(x, residual, cos, sin, context)
        x, residual = last(x, residual, cos, sin, context, only)
        hidden, _ = _norm(self.norm, x, residual, False)
        return BaseModelOutputWithPast(last_hidden_state=hidden[None])  # type: ignore[index]


def can_fuse(model: PreTrainedModel) -> bool:
    """Whether every part of this model is one whose fused forward is known."""
    decoder = getattr(model, "model", None)
    if decoder is None or type(decoder).__name__ not in {f"{family}Model" for family in FAMILIES}:
        return False
    if not type(decoder).__module__.startswith("transformers.models."):
        return False
    inv_freq = getattr(decoder.rotary_emb, "inv_freq", None)
    return inv_freq is not None and all(_matches(layer, 2 * inv_freq.numel()) for layer in decoder.layers)


def fuse_layer(layer: nn.Module, to_fp8: bool, gemm: Gemm = multiply_by_torch) -> FusedLayer:
    """The fused form of a layer of a model that `can_fuse`; it takes the layer's weights over."""
    return FusedLayer(layer, to_fp8, gemm)


def fuse_decoder(model: PreTrainedModel) -> None:
    """Puts the fused decoder in place, once each layer is a FusedLayer."""
    model.model = FusedDecoder(model.model)


def _matches(layer: nn.Module, rotary_dim: int) -> bool:
    names = {name for name, _ in layer.named_children()}
    if names != LAYER_PARTS:
        return False
    attention: Any = layer.self_attn
    parts = {name for name, _ in attention.named_children()}
    return (
        parts in (ATTENTION_PARTS, ATTENTION_PARTS | NORM_PARTS)
        and attention.head_dim == rotary_dim
        and all(type(getattr(attention, name)) is nn.Linear for name in PROJECTIONS)
        and type(layer.mlp.gate_proj) is nn.Linear  # type: ignore[union-attr]
        and type(layer.mlp.up_proj) is nn.Linear  # type: ignore[union-attr]
        and attention.config.hidden_act in ACTIVATIONS
    )


def window_of(attention: Any) -> int | None:
    """Qwen's attention says its window; Mistral's reads it from the config; Llama's has none."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window  # type: ignore[no-any-return]
    if type(attention).__name__ == "MistralAttention":
        return getattr(attention.config, "sliding_window", None)
    return None


def _split(of: QkvProduct, **options: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return fused_ops.split_qkv(
        of.channels, of.cos, of.sin, of.num_heads, of.num_kv_heads, of.norms, **options
    )


def _norm(module: Any, x: ScaledOutput, residual: torch.Tensor | None, to_fp8: bool) -> Any:
    return fused_ops.add_rms_norm(x, residual, module.weight, module.variance_epsilon, to_fp8)
