"""Traces a model of an architecture that the graph builder doesn't know, through torch.onnx.

The graph has the built one's inputs and outputs, so that one device runtime runs both: new keys and values
are written into the caller's buffers, and attention reads as much of them as is filled. Masks and positions
are the architecture's own, as transformers makes them. Owns the tracing and what it needs to know of a model;
checks no result, which `verify` does.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

from longshore.errors import UnsupportedModelError
from longshore_export.graph_parts import MAX_MODEL_BYTES, OPSET
from longshore_export.shape import STATIC_ROPE

EXAMPLE_TOKENS = 3
_MAX_CAUSE = 300


@dataclass(frozen=True, slots=True)
class TracedShape:
    """What the runtime has to know of a model: the buffers' sizes, vocabulary and context.

    `window` is how far the layers look back that don't look at everything, or None.
    """

    family: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_tokens: int
    window: int | None


def read_traced_shape(model: Any, max_tokens: int | None = None) -> TracedShape:
    """Asks a transformers model for a cache; UnsupportedModelError where it is not one of keys and values.

    `max_tokens` shortens the context, and has to be given where the configuration names none.
    """
    config = model.config.get_text_config(decoder=True)
    longest = getattr(config, "max_position_embeddings", None)
    context = max_tokens or longest
    if context is None:
        raise UnsupportedModelError(f"a {config.model_type} model names no context: give --max-tokens")
    if max_tokens is not None and not 1 <= max_tokens <= (longest or max_tokens):
        raise UnsupportedModelError(f"the context must be 1 to {longest} tokens, not {max_tokens}")
    _check_rope(config, context)
    num_layers, num_kv_heads, head_dim = _cache_sizes(model, config.model_type)
    window = getattr(config, "sliding_window", None)
    return TracedShape(
        config.model_type, num_layers, num_kv_heads, head_dim, config.vocab_size, context,
        window if window and window < context else None,
    )  # fmt: skip


def trace(model: Any, shape: TracedShape) -> onnx.ModelProto:
    """The graph of a transformers model in fp32; UnsupportedModelError naming why it can't be traced."""
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    if num_bytes > MAX_MODEL_BYTES:
        raise UnsupportedModelError(f"{num_bytes} bytes of weights don't fit into one ONNX file")
    module, arguments = _Traced(model, shape).eval(), _arguments(shape)
    tokens = torch.export.Dim.DYNAMIC
    with _quiet(), settled_rope(model), torch.no_grad():
        try:
            program = torch.onnx.export(
                module,
                arguments,
                dynamo=True,
                opset_version=OPSET,
                input_names=[
                    "input_ids",
                    "rows",
                    "seqlens_k",
                    "total_sequence_length",
                    *_names("past", shape),
                ],
                output_names=["logits", *_names("present", shape)],
                dynamic_shapes=({1: tokens}, {0: tokens}, None, None, (None,) * (len(arguments) - 4)),
                external_data=False,
                verbose=False,
            )
        except Exception as error:  # torch's exporter raises what any of its steps raised
            raise UnsupportedModelError(f"{shape.family} can't be traced: {_cause(error)}") from None
    assert program is not None
    return _cleaned(program.model_proto)


class _Traced(nn.Module):
    """A model over buffers that are given, [1, kv_heads, max_tokens, head_dim] each."""

    def __init__(self, model: Any, shape: TracedShape) -> None:
        super().__init__()
        self.model = model
        self._max_tokens = shape.max_tokens
        self._takes_rows = "logits_to_keep" in inspect.signature(model.forward).parameters

    def forward(
        self, input_ids: Tensor, rows: Tensor, seqlens_k: Tensor, total_sequence_length: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        """Inputs and outputs as `graph` describes them."""
        total = total_sequence_length[0].item()
        torch._check(total >= 1)
        torch._check(total <= self._max_tokens)
        num_past = total_sequence_length.long() - input_ids.shape[1]
        positions = torch.arange(input_ids.shape[1]) + num_past
        layers = [_Buffer(*pair, positions, total) for pair in zip(past[::2], past[1::2], strict=True)]
        wanted = {"logits_to_keep": rows} if self._takes_rows else {}
        out = self.model(
            input_ids=input_ids, position_ids=positions[None], past_key_values=Cache(layers=layers),
            use_cache=True, **wanted,
        )  # fmt: skip
        logits = out.logits[0] if self._takes_rows else out.logits[0, rows]
        return (logits, *(tensor for layer in layers for tensor in layer.buffers()))


class _Buffer(CacheLayerMixin):
    """One layer's keys and values: new ones are put in their places, and all up to the last are read."""

    is_compileable = True  # so that masks are computed, rather than left out where one length allows it
    is_sliding = False  # every layer keeps everything; its mask says how far it looks

    def __init__(self, keys: Tensor, values: Tensor, positions: Tensor, total: Any) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self._positions, self._total = positions, total

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The buffers are there from the start."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """All keys and values so far, [1, kv_heads, total, head_dim] each."""
        places = self._positions.view(1, 1, -1, 1).expand_as(key_states)
        self.keys = torch.scatter(self.keys, 2, places, key_states)
        self.values = torch.scatter(self.values, 2, places, value_states)
        return self.keys.narrow(2, 0, self._total), self.values.narrow(2, 0, self._total)

    def buffers(self) -> tuple[Tensor, Tensor]:
        """The whole buffers, as they are after this call."""
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[Any, int]:
        """(keys that a mask covers, of which the first is at 0)."""
        return self._total, 0

    def get_seq_length(self) -> Any:
        """Tokens before this call's."""
        return self._positions[0]

    def get_max_length(self) -> int:
        """Tokens that fit."""
        return int(self.keys.shape[2])


# -- what a model is asked --------------------------------------------------------------------------


def _check_rope(config: Any, context: int) -> None:
    """Refuse RoPE that changes with the length of a text, unless the context never gets to where it does.

    `dynamic` changes past max_position_embeddings, which no context here exceeds.
    """
    given = getattr(config, "rope_parameters", None) or {}
    for rope in given.values() if all(isinstance(one, dict) for one in given.values()) else [given]:
        kind = rope.get("rope_type", "default")
        unchanged_until = rope.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", 0
        )
        if kind not in (*STATIC_ROPE, "proportional", "dynamic") and context > (unchanged_until or 0):
            raise UnsupportedModelError(
                f"RoPE of type {kind!r} changes with the length of a text: give --max-tokens of at most "
                f"{unchanged_until or 'its first context'}"
            )


@contextlib.contextmanager
def settled_rope(model: nn.Module) -> Iterator[None]:
    """With `dynamic` RoPE as it is within the model's context, whatever the length of a text."""
    found = [module for module in model.modules() if getattr(module, "rope_type", None) == "dynamic"]
    for module in found:
        module.rope_type = "default"  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in found:
            module.rope_type = "dynamic"  # type: ignore[assignment]


def _cache_sizes(model: Any, family: str) -> tuple[int, int, int]:
    """(layers, heads, head size) of the keys, which must be those of the values and of every layer."""
    cache = DynamicCache(config=model.config)
    try:
        with torch.no_grad():
            model(torch.zeros(1, 2, dtype=torch.long), past_key_values=cache, use_cache=True)
        sizes = {tensor.shape[1::2] for layer in cache.layers for tensor in (layer.keys, layer.values)}
    except Exception as error:  # a model without a cache of keys and values fails in its own way
        raise UnsupportedModelError(f"{family} keeps no plain keys and values: {_cause(error)}") from None
    if len(sizes) != 1:
        raise UnsupportedModelError(f"{family} has keys and values of several sizes: {sorted(sizes)}")
    [(num_heads, head_dim)] = sizes
    return len(cache.layers), int(num_heads), int(head_dim)


# -- the exporter -----------------------------------------------------------------------------------


def _arguments(shape: TracedShape) -> tuple[Tensor, ...]:
    """An example call: some tokens after others, of which not all rows are wanted."""
    total = torch.tensor([min(EXAMPLE_TOKENS + 2, shape.max_tokens)], dtype=torch.int32)
    buffer = (1, shape.num_kv_heads, shape.max_tokens, shape.head_dim)
    buffers = (torch.zeros(buffer) for _ in range(2 * shape.num_layers))
    return (
        torch.arange(EXAMPLE_TOKENS)[None],
        torch.tensor([0, EXAMPLE_TOKENS - 1]),
        total - 1,
        total,
        *buffers,
    )


def _names(when: str, shape: TracedShape) -> list[str]:
    return [f"{when}_{what}.{layer}" for layer in range(shape.num_layers) for what in ("key", "value")]


def _cleaned(model: onnx.ModelProto) -> onnx.ModelProto:
    """Without what the exporter notes beside the graph: source lines and paths of the machine it ran on."""
    if model.functions:
        raise UnsupportedModelError("the traced graph needs functions of its own")
    del model.metadata_props[:]
    model.doc_string = ""
    for item in (
        model.graph,
        *model.graph.node,
        *model.graph.input,
        *model.graph.output,
        *model.graph.value_info,
    ):
        item.doc_string = ""
        del item.metadata_props[:]
    for tensor in model.graph.initializer:
        tensor.doc_string = ""
        del tensor.metadata_props[:]
    return model


def _cause(error: BaseException) -> str:
    """One line of what lies at the bottom of the exporter's report."""
    while (under := error.__cause__) is not None:
        error = under
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:_MAX_CAUSE]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's own warnings, which name no fault of the model."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
