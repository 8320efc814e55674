"""The attention loss: how tokens relate to one another inside a layer, whatever the number and size of heads.

Owns MiniLMv2's relations (Wang et al. 2021, arXiv 2012.15828); keeps no parameters.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel


class RelationLoss(nn.Module):
    """KL between the relations of the teacher's and the student's last layers.

    A relation is softmax(A A^T) over the earlier tokens, for A the queries, the keys and the values, cut into
    the same number of relation heads on both sides; sizes and heads of the two may differ.
    """

    def __init__(self, student: PretrainedConfig, teacher: PretrainedConfig) -> None:
        super().__init__()
        self.num_relation_heads = _num_relation_heads(student, teacher)

    def forward(
        self,
        student: PreTrainedModel,
        student_states: list[Tensor],
        teacher: PreTrainedModel,
        teacher_states: list[Tensor],
    ) -> Tensor:
        """Mean over relations, heads and rows; `*_states` as `hidden_states` gives them."""
        ours, theirs = _projections(student, student_states), _projections(teacher, teacher_states)
        losses = [self._loss(a, b) for a, b in zip(ours, theirs, strict=True)]
        return torch.stack(losses).mean()

    def _loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        ours, theirs = self._relation(student), self._relation(teacher.detach())
        # the future has probability 0 on both sides, where the term is 0 and not 0 * (-inf + inf)
        seen = theirs > -math.inf
        terms = torch.where(seen, theirs.exp() * (theirs - ours).masked_fill(~seen, 0.0), 0.0)
        return terms.sum(-1).mean()

    def _relation(self, states: Tensor) -> Tensor:
        """Log probabilities [batch, heads, tokens, tokens] of states [batch, tokens, size]."""
        heads = states.float().unflatten(-1, (self.num_relation_heads, -1)).transpose(1, 2)
        scores = heads @ heads.mT / math.sqrt(heads.shape[-1])
        num_tokens = scores.shape[-1]
        future = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=scores.device).triu(1)
        return F.log_softmax(scores.masked_fill(future, -math.inf), dim=-1)


def _projections(model: PreTrainedModel, states: list[Tensor]) -> list[Tensor]:
    """Queries, keys and values of the last layer, [batch, tokens, size] each, before any rotation."""
    layer = model.model.layers[-1]
    normed = layer.input_layernorm(states[-3])  # the last layer's input: its output and the final norm follow
    attention = layer.self_attn
    return [attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed)]


def _num_relation_heads(student: PretrainedConfig, teacher: PretrainedConfig) -> int:
    """The most relation heads, up to the teacher's own, that divide every size on both sides."""
    sizes = [size for config in (student, teacher) for size in _sizes(config)]
    common = math.gcd(*sizes)
    return max(n for n in range(1, teacher.num_attention_heads + 1) if common % n == 0)


def _sizes(config: PretrainedConfig) -> tuple[int, int]:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
