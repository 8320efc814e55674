"""Builds a smaller student of the same family as its teacher.

Owns shapes and initial weights; training lives elsewhere. Reads no file and loads no remote code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

FAMILIES = ("llama", "qwen2", "qwen3")


@dataclass(frozen=True, slots=True)
class StudentShape:
    """The sizes in which a student differs from its teacher."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        if min(self.hidden_size, self.intermediate_size, self.num_hidden_layers, self.head_dim) < 1:
            raise ValueError("every size of a student must be at least 1")
        if self.num_key_value_heads < 1 or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_attention_heads must be a multiple of num_key_value_heads")
        if self.head_dim % 2:
            raise ValueError("head_dim must be even, since rotary embedding turns pairs")


def student_config(teacher: PretrainedConfig, shape: StudentShape) -> PretrainedConfig:
    """The teacher's configuration with the student's sizes; vocabulary, RoPE and context stay as they are.

    Raises ValueError for a family whose student could not be distilled layer by layer.
    """
    if teacher.model_type not in FAMILIES:
        raise ValueError(f"cannot build a student of {teacher.model_type!r}; one of {', '.join(FAMILIES)}")
    values: dict[str, Any] = teacher.to_dict()
    values.pop("layer_types", None)  # as long as the teacher is deep
    values |= {name: getattr(shape, name) for name in shape.__dataclass_fields__}
    return type(teacher).from_dict(values)


def build_student(teacher: PreTrainedModel, shape: StudentShape, seed: int) -> PreTrainedModel:
    """A fresh fp32 student for `teacher`, on the CPU, with random weights drawn from `seed`."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        student_config(teacher.config, shape), dtype=torch.float32, attn_implementation="sdpa"
    )
    return model
