"""What the graph builder needs to know of a model, read from its Hugging Face configuration.

Refuses, by name, every setting that the graph would not carry out. Knows no ONNX.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from longshore.errors import UnsupportedModelError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# RoPE scalings whose tables depend on the position alone, not on the length of the text.
STATIC_ROPE = ("default", "linear", "llama3", "yarn")
HEAD_DIM_STEP = 8  # com.microsoft.GroupQueryAttention takes multiples of 8


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """Sizes of a decoder-only model in the Llama form; `max_tokens` is the length of its context."""

    family: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_tokens: int
    rms_norm_eps: float
    has_qk_norm: bool
    is_tied: bool

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim


def read_shape(config: Any, max_tokens: int | None = None) -> DecoderShape:
    """The shape of a transformers configuration; raises UnsupportedModelError naming what is not known.

    `max_tokens` shortens the context, and with it the KV buffer on the device.
    """
    _check(config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_dim % HEAD_DIM_STEP:
        raise UnsupportedModelError(f"head_dim must be a multiple of {HEAD_DIM_STEP}, not {head_dim}")
    longest = config.max_position_embeddings
    if max_tokens is not None and not 1 <= max_tokens <= longest:
        raise UnsupportedModelError(f"the context must be 1 to {longest} tokens, not {max_tokens}")
    return DecoderShape(
        family=config.model_type,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        vocab_size=config.vocab_size,
        max_tokens=max_tokens or longest,
        rms_norm_eps=config.rms_norm_eps,
        has_qk_norm=config.model_type == "qwen3",
        is_tied=bool(config.tie_word_embeddings),
    )


def _check(config: Any) -> None:
    if config.model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"the graph builder knows {', '.join(FAMILIES)}; this model is {config.model_type!r}"
        )
    if config.hidden_act != "silu":
        raise UnsupportedModelError(f"the activation must be silu, not {config.hidden_act!r}")
    rope = getattr(config, "rope_parameters", None) or {}
    rope_type = rope.get("rope_type", "default")
    if rope_type not in STATIC_ROPE or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModelError(f"RoPE of type {rope_type!r} is not carried out by the graph")
    if _slides(config):
        raise UnsupportedModelError("sliding-window attention is not carried out by the graph")


def _slides(config: Any) -> bool:
    """True if some layer looks back less far than the context reaches."""
    window = getattr(config, "sliding_window", None)
    if not window or window >= config.max_position_embeddings:
        return False
    layers = getattr(config, "layer_types", None)
    return "sliding_attention" in layers if layers else bool(getattr(config, "use_sliding_window", True))
