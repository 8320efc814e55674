"""On-policy distillation: the student writes, the teacher grades every token of what it wrote.

Owns the generalized Jensen-Shannon loss and the generation of rows (GKD, Agarwal et al. 2024, arXiv
2306.13649). It decides nothing about when a step is on-policy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Rows:
    """What the student wrote: `input_ids` [rows, tokens], prompts padded on the left.

    `attention_mask` is 0 on the padding, `labels` hold the student's own next token, or -100 where there is
    none to grade.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    @property
    def position_ids(self) -> Tensor:
        """Positions that begin at each row's first real token."""
        return (self.attention_mask.cumsum(-1) - 1).clamp_(min=0)


@torch.no_grad()
def write_rows(
    student: PreTrainedModel,
    prompts: list[list[int]],
    num_new_tokens: int,
    pad_id: int,
    end_id: int,
    seed: int,
) -> Rows:
    """Let the student go on from each prompt, drawing at temperature 1; a seed gives the same rows again."""
    device = next(student.parameters()).device
    width = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    mask = (torch.arange(width, device=device)[None] >= (width - lengths)[:, None]).long()
    was_training = student.training
    student.eval()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        written = student.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=num_new_tokens,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            pad_token_id=pad_id,
            eos_token_id=end_id,
        )
    student.train(was_training)
    return _graded(written, mask, width, end_id)


def _graded(written: Tensor, prompt_mask: Tensor, width: int, end_id: int) -> Rows:
    """Marks what came after a row's end as padding and the written tokens as labels."""
    answers = written[:, width:]
    ended_before = (answers == end_id).cumsum(-1) - (answers == end_id).long()
    real = (ended_before == 0).long()
    mask = torch.cat([prompt_mask, real], dim=1)
    labels = torch.full_like(written, -100)
    labels[:, width - 1 : -1] = answers.masked_fill(real == 0, -100)
    return Rows(written, mask, labels)


def generalized_jsd(student_logits: Tensor, teacher_logits: Tensor, beta: float) -> Tensor:
    """JSD(beta) of two rows of logits [rows, vocabulary], mean over rows; `beta` strictly between 0 and 1.

    Near 0 it behaves as KL(teacher || student), near 1 as KL(student || teacher).
    """
    ours = F.log_softmax(student_logits.float(), dim=-1)
    theirs = F.log_softmax(teacher_logits.float(), dim=-1)
    weights = torch.tensor([beta, 1.0 - beta], device=ours.device).log()
    mixed = torch.logsumexp(torch.stack([theirs + weights[0], ours + weights[1]]), dim=0)
    to_teacher = (theirs.exp() * (theirs - mixed)).sum(-1)
    to_student = (ours.exp() * (ours - mixed)).sum(-1)
    return (beta * to_teacher + (1.0 - beta) * to_student).mean()
