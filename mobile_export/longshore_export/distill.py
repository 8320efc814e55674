"""Distillation losses for any Llama-, Qwen2- or Qwen3-shaped pair of teacher and student.

Owns the losses and the forward pass that exposes hidden states; never data, optimisers or a training loop.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel


def hidden_states(
    model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor | None = None
) -> list[Tensor]:
    """Every layer's output, [batch, tokens, hidden] each: the embedding first, the final normed state last.

    Causal attention over full rows, without padding. Positions may have gaps, which transformers' own forward
    would take for borders between packed sequences.
    """
    inner = model.model
    if position_ids is None:
        position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    states = [inner.embed_tokens(input_ids)]
    rotary = inner.rotary_emb(states[0], position_ids)
    for layer in inner.layers:
        states.append(layer(states[-1], attention_mask=None, position_embeddings=rotary))
    return [*states, inner.norm(states[-1])]


def soft_target_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) over the vocabulary, mean over rows, times T^2 (Hinton et al. 2015)."""
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    return F.kl_div(student, teacher, log_target=True, reduction="batchmean") * temperature**2


def layer_map(num_student_layers: int, num_teacher_layers: int) -> list[tuple[int, int]]:
    """(student layer, teacher layer) pairs, 1-based, spread evenly; ValueError if the student is deeper."""
    if not 1 <= num_student_layers <= num_teacher_layers:
        raise ValueError(
            f"a student of {num_student_layers} layers cannot follow a teacher of {num_teacher_layers}"
        )
    return [(i, round(i * num_teacher_layers / num_student_layers)) for i in range(1, num_student_layers + 1)]


class HiddenStateLoss(nn.Module):
    """How far a linear map of the student's states is from the teacher's, both scaled to unit mean square.

    The maps are learnt along with the student and thrown away after it (FitNets, Romero et al. 2015).
    """

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel):
        super().__init__()
        ours, theirs = student.config, teacher.config
        self.pairs = layer_map(ours.num_hidden_layers, theirs.num_hidden_layers)
        self.maps = nn.ModuleList(
            nn.Linear(ours.hidden_size, theirs.hidden_size, bias=False) for _ in range(len(self.pairs))
        )
        for linear in self.maps:
            nn.init.orthogonal_(linear.weight)

    def forward(self, student_states: list[Tensor], teacher_states: list[Tensor]) -> Tensor:
        losses = [
            F.mse_loss(_unit(linear(student_states[ours])).float(), _unit(teacher_states[theirs]).float())
            for linear, (ours, theirs) in zip(self.maps, self.pairs, strict=True)
        ]
        return torch.stack(losses).mean()


def _unit(states: Tensor) -> Tensor:
    return F.rms_norm(states, states.shape[-1:])


@dataclass(frozen=True, slots=True)
class DistillWeights:
    """Weights of the three losses; `hidden` falls in a line to nothing at `hidden_until` of the run."""

    hard: float = 0.5
    soft: float = 0.5
    hidden: float = 2.0
    hidden_until: float = 0.6
    temperature: float = 1.0

    def hidden_at(self, progress: float) -> float:
        """The hidden-state weight when `progress` (0..1) of the run is done."""
        return self.hidden * max(0.0, 1.0 - progress / self.hidden_until)


class Distiller(nn.Module):
    """A frozen teacher and the loss that a student learns from; its parameters are the hidden-state maps."""

    def __init__(
        self, student: PreTrainedModel, teacher: PreTrainedModel, weights: DistillWeights | None = None
    ):
        super().__init__()
        if student.config.vocab_size != teacher.config.vocab_size:
            raise ValueError("teacher and student must share one vocabulary")
        self.weights = weights or DistillWeights()
        self.hidden_loss = HiddenStateLoss(student, teacher)
        self._student, self._teacher = (
            [student],
            [teacher.eval().requires_grad_(False)],
        )  # lists: not submodules

    def forward(
        self, input_ids: Tensor, position_ids: Tensor | None, labels: Tensor, progress: float
    ) -> dict[str, Tensor]:
        """Losses by name, "total" among them; `labels` [batch, tokens] holds the next token, or -100."""
        student, teacher = self._student[0], self._teacher[0]
        with torch.no_grad():
            teacher_states = hidden_states(teacher, input_ids, position_ids)
            chosen = labels.flatten().ge(0).nonzero().squeeze(-1)
            teacher_logits = teacher.lm_head(teacher_states[-1].flatten(0, 1)[chosen])
        student_states = hidden_states(student, input_ids, position_ids)
        student_logits = student.lm_head(student_states[-1].flatten(0, 1)[chosen])
        w = self.weights
        losses = {
            "hard": F.cross_entropy(student_logits.float(), labels.flatten()[chosen]),
            "soft": soft_target_loss(student_logits, teacher_logits, w.temperature),
        }
        total = w.hard * losses["hard"] + w.soft * losses["soft"]
        hidden_weight = w.hidden_at(progress)
        if hidden_weight > 0:
            losses["hidden"] = self.hidden_loss(student_states, teacher_states)
            total = total + hidden_weight * losses["hidden"]
        return {**losses, "total": total}
