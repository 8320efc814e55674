"""Distillation losses for any Llama-, Qwen2- or Qwen3-shaped pair of teacher and student.

Owns the losses and the forward pass that exposes hidden states; never data, optimisers or a training loop.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from longshore_export.distill.on_policy import Rows, generalized_jsd
from longshore_export.distill.relations import RelationLoss


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
    """Weights of the losses; `hidden` and `attention` fall in a line to nothing at `hidden_until` of the run.

    `jsd_beta` is that of the on-policy loss, which stands alone on its steps.
    """

    hard: float = 0.5
    soft: float = 0.5
    hidden: float = 2.0
    attention: float = 0.0
    hidden_until: float = 0.6
    temperature: float = 1.0
    jsd_beta: float = 0.5

    def hidden_at(self, progress: float) -> float:
        """The hidden-state weight when `progress` (0..1) of the run is done."""
        return self.hidden * self._fade(progress)

    def attention_at(self, progress: float) -> float:
        """The attention weight when `progress` (0..1) of the run is done."""
        return self.attention * self._fade(progress)

    def _fade(self, progress: float) -> float:
        return max(0.0, 1.0 - progress / self.hidden_until)


class Distiller(nn.Module):
    """A frozen teacher and the loss that a student learns from; its parameters are the hidden-state maps.

    `vocabulary` [student ids] gives the teacher's id of each of the student's; None where they are the same.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        weights: DistillWeights | None = None,
        vocabulary: Tensor | None = None,
    ):
        super().__init__()
        if vocabulary is None and student.config.vocab_size != teacher.config.vocab_size:
            raise ValueError("teacher and student must share one vocabulary, or a map between theirs")
        self.weights = weights or DistillWeights()
        self.hidden_loss = HiddenStateLoss(student, teacher)
        self.relation_loss = RelationLoss(student.config, teacher.config) if self.weights.attention else None
        self.register_buffer("_vocabulary", vocabulary, persistent=False)
        self._student, self._teacher = (
            [student],
            [teacher.eval().requires_grad_(False)],
        )  # lists: not submodules

    def forward(
        self, input_ids: Tensor, position_ids: Tensor | None, labels: Tensor, progress: float
    ) -> dict[str, Tensor]:
        """Losses by name, "total" among them; `labels` [batch, tokens] holds the next token, or -100."""
        student, teacher, w = self._student[0], self._teacher[0], self.weights
        hidden_weight, attention_weight = w.hidden_at(progress), w.attention_at(progress)
        chosen = labels.flatten().ge(0).nonzero().squeeze(-1)
        student_states = hidden_states(student, input_ids, position_ids)
        student_logits = student.lm_head(_rows(student_states[-1], chosen))
        losses = {"hard": F.cross_entropy(student_logits.float(), labels.flatten()[chosen])}
        total = w.hard * losses["hard"]
        if not (w.soft or hidden_weight or attention_weight):
            return {**losses, "total": total}  # nobody asks the teacher
        with torch.no_grad():
            teacher_states = hidden_states(teacher, self._in_teachers(input_ids), position_ids)
            teacher_logits = self._in_students(teacher.lm_head(_rows(teacher_states[-1], chosen)))
        losses["soft"] = soft_target_loss(student_logits, teacher_logits, w.temperature)
        total = total + w.soft * losses["soft"]
        if hidden_weight > 0:
            losses["hidden"] = self.hidden_loss(student_states, teacher_states)
            total = total + hidden_weight * losses["hidden"]
        if self.relation_loss is not None and attention_weight > 0:
            losses["attention"] = self.relation_loss(student, student_states, teacher, teacher_states)
            total = total + attention_weight * losses["attention"]
        return {**losses, "total": total}

    def grade(self, rows: Rows) -> dict[str, Tensor]:
        """The loss on what the student wrote itself, "on_policy" and the same as "total"."""
        chosen = rows.labels.flatten().ge(0).nonzero().squeeze(-1)
        where = {"attention_mask": rows.attention_mask, "position_ids": rows.position_ids, "use_cache": False}
        with torch.no_grad():
            theirs = self._teacher[0](self._in_teachers(rows.input_ids), **where).logits
        ours = self._student[0](rows.input_ids, **where).logits
        loss = generalized_jsd(
            _rows(ours, chosen), self._in_students(_rows(theirs, chosen)), self.weights.jsd_beta
        )
        return {"on_policy": loss, "total": loss}

    def _in_teachers(self, token_ids: Tensor) -> Tensor:
        return token_ids if self._vocabulary is None else self._vocabulary[token_ids]

    def _in_students(self, logits: Tensor) -> Tensor:
        """The teacher's logits of the student's tokens; a softmax over them renormalizes."""
        return logits if self._vocabulary is None else logits[:, self._vocabulary]


def _rows(states: Tensor, chosen: Tensor) -> Tensor:
    """Of states [batch, tokens, size] the chosen tokens', [chosen, size]."""
    return states.flatten(0, 1)[chosen]
