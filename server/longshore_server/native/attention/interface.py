"""The seam to transformers: registers our attention under one name and hands each call to the step's context.

A model built with `attn_implementation=ATTENTION_NAME` calls us for every layer; the context travels as a
keyword argument of the model's forward. What a call does with the KV cache is the context's business.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import AttentionInterface

from longshore_server.native.attention.kv_cache import KVTarget
from longshore_server.native.errors import UnsupportedModelError
from longshore_server.native.model.fp8 import ScaledOutput

ATTENTION_NAME = "longshore_paged"
CONTEXT_KEYWORD = "longshore_context"


class AttentionContext(Protocol):
    """What one forward pass needs to attend: where keys and values go, and which of them each row sees."""

    def attend(
        self,
        layer_index: int,
        query: torch.Tensor,  # [tokens, num_heads, head_dim]
        key: torch.Tensor,  # [tokens, num_kv_heads, head_dim]
        value: torch.Tensor,  # [tokens, num_kv_heads, value_dim]
        scale: float,
        window: int | None,  # a row sees itself and the window - 1 tokens before it
    ) -> torch.Tensor: ...  # [tokens, num_heads, value_dim]

    def check_arguments(self, arguments: dict[str, Any], attention_mask: torch.Tensor | None) -> None: ...


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """Rows that are each the last of a sequence: where its table stands, its tokens, those of its prompt."""

    table_rows: torch.Tensor  # [rows] int64
    context_lens: torch.Tensor  # [rows] int64; 0 for none
    prompt_lens: torch.Tensor  # [rows] int64

    def __getitem__(self, rows: slice) -> DecodeRows:
        return DecodeRows(self.table_rows[rows], self.context_lens[rows], self.prompt_lens[rows])


@dataclass(frozen=True, slots=True)
class QkvProduct:
    """The merged query, key and value product of some rows, and what makes heads of it, as in split_qkv()."""

    channels: ScaledOutput  # [rows, (num_heads + 2 * num_kv_heads) * head_dim]
    cos: torch.Tensor  # [rows, head_dim]; the heads have its dtype
    sin: torch.Tensor
    num_heads: int
    num_kv_heads: int
    norms: tuple[torch.Tensor, torch.Tensor, float] | None  # q and k weight [head_dim], eps


@dataclass(frozen=True, slots=True)
class SampledRows:
    """The rows of a step whose logits are wanted, by their places in it."""

    rows: torch.Tensor  # [sampled] int64
    decodes: DecodeRows


@dataclass(frozen=True, slots=True)
class PickedPages:
    """The blocks that each row's KV heads see. A row of length 0 sees all that its own table names."""

    tables: torch.Tensor  # [rows, num_kv_heads, blocks] int32
    lens: torch.Tensor  # [rows] int64, tokens

    def __getitem__(self, rows: slice) -> PickedPages:
        return PickedPages(self.tables[rows], self.lens[rows])


class FusedContext(AttentionContext):
    """A context whose pages a fused layer may write itself, and which can attend the sampled rows alone."""

    @property
    @abstractmethod
    def sampled(self) -> SampledRows | None:
        """The rows whose logits are wanted; None for all."""

    @property
    @abstractmethod
    def reads_rows(self) -> bool:
        """Whether attend_written() reads keys and values from rows too, not from pages alone."""

    @abstractmethod
    def kv_target(self, layer_index: int) -> KVTarget:
        """Where a fused kernel puts this step's keys and values; attend_written() is for after that."""

    @abstractmethod
    def takes(self, layer_index: int, product: QkvProduct) -> bool:
        """Whether attend_product() is for this step and product; if not, attend_written() is."""

    @abstractmethod
    def attend_product(
        self, layer_index: int, product: QkvProduct, scale: float, window: int | None
    ) -> torch.Tensor:
        """Puts the rows' keys and values into their slots and attends: [tokens, num_heads, head_dim]."""

    @abstractmethod
    def attend_written(
        self,
        layer_index: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        """Attends rows whose keys and values stand in their slots; shapes as in attend()."""

    @abstractmethod
    def attend_sampled(
        self, layer_index: int, query: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:
        """Attends the sampled rows alone; their keys and values stand in their slots."""


def register() -> None:
    """Makes ATTENTION_NAME known to transformers; harmless when repeated."""
    AttentionInterface.register(ATTENTION_NAME, paged_attention_forward)


def paged_attention_forward(
    module: nn.Module,
    query: torch.Tensor,  # [1, num_heads, tokens, head_dim]
    key: torch.Tensor,  # [1, num_kv_heads, tokens, head_dim]
    value: torch.Tensor,  # [1, num_kv_heads, tokens, value_dim]
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls; returns [1, tokens, num_heads, value_dim]."""
    context: AttentionContext | None = arguments.get(CONTEXT_KEYWORD)
    if context is None:
        raise UnsupportedModelError(f"{type(module).__name__} keeps {CONTEXT_KEYWORD} from its attention")
    context.check_arguments(arguments, attention_mask)
    output = context.attend(
        module.layer_idx,  # type: ignore[arg-type]
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window,
    )
    return output.unsqueeze(0), None
