"""A model of the first layer alone, of a model whose others may still be without weights."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from longshore_server.native.gemm.multiply import Gemm
from longshore_server.native.model.fuse import FusedDecoder
from longshore_server.native.model.materialize import fill_buffers
from longshore_server.native.model.products import multiply_linears_by


@torch.no_grad()
def first_layer_alone(model: PreTrainedModel, device: torch.device, gemm: Gemm | None) -> PreTrainedModel:
    """The form that serves, with the shapes of the whole model but for an embedding of the token 0 alone.

    `model`'s first layer, which is fused and has its weights, stands in it twice: a last layer attends for
    other rows than those before. What else it holds is zeros. `gemm` multiplies its head, where that is not
    torch's work.
    """
    alone = copy.copy(model)
    alone._modules = dict(model._modules)
    decoder: Any = model.model
    alone.model = FusedDecoder(
        SimpleNamespace(
            embed_tokens=nn.Embedding.from_pretrained(  # which draws no numbers
                decoder.embed_tokens.weight.new_zeros(1, decoder.embed_tokens.embedding_dim, device=device)
            ),
            layers=nn.ModuleList([decoder.layers[0]] * 2),
            norm=copy.deepcopy(decoder.norm).to_empty(device=device),
            rotary_emb=copy.deepcopy(decoder.rotary_emb),
        )
    )
    alone.lm_head = copy.deepcopy(model.lm_head).to_empty(device=device)  # type: ignore[operator]
    for module in (alone.model.norm, alone.lm_head):
        for parameter in module.parameters():
            parameter.zero_()
    fill_buffers(alone, device)
    if gemm is not None:
        multiply_linears_by(alone, gemm)
    return alone
