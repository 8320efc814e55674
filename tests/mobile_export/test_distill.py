"""Distillation losses and student construction, on tiny models of every family they are for."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from longshore_export.distill import Distiller, DistillWeights, hidden_states, layer_map, soft_target_loss
from longshore_export.student import StudentShape, build_student, student_config

SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 50,
}  # fmt: skip
FAMILIES = [
    (LlamaConfig, LlamaForCausalLM),
    (Qwen2Config, Qwen2ForCausalLM),
    (Qwen3Config, Qwen3ForCausalLM),
]
SHAPE = StudentShape(16, 32, 2, 2, 1, 8)


@pytest.fixture(params=FAMILIES, ids=lambda pair: pair[0].model_type)
def teacher(request: pytest.FixtureRequest) -> PreTrainedModel:
    config, model = request.param
    torch.manual_seed(1)
    return model(config(**SIZES)).eval()


def test_hidden_states_equal_transformers_own(teacher: PreTrainedModel) -> None:
    ids = torch.randint(0, 50, (2, 9))
    ours = teacher.lm_head(hidden_states(teacher, ids)[-1])
    torch.testing.assert_close(ours, teacher(ids).logits)


def test_a_student_keeps_family_and_vocabulary(teacher: PreTrainedModel) -> None:
    student = build_student(teacher, SHAPE, seed=3)
    assert type(student) is type(teacher) and student.config.vocab_size == 50
    assert student.config.num_hidden_layers == len(student.model.layers) == 2
    assert student(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 50)
    again = build_student(teacher, SHAPE, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), again.parameters(), strict=True))


def test_a_few_steps_bring_the_student_closer(teacher: PreTrainedModel) -> None:
    student = build_student(teacher, SHAPE, seed=0)
    distiller = Distiller(student, teacher, DistillWeights(hard=0.0, soft=1.0, hidden=1.0))
    ids = torch.randint(0, 50, (4, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.roll(-1, 1)
    labels[:, -1] = -100
    before = [parameter.clone() for parameter in teacher.parameters()]
    optimiser = torch.optim.AdamW([*student.parameters(), *distiller.parameters()], lr=1e-2)
    totals = []
    for _ in range(30):
        losses = distiller(ids, None, labels, progress=0.0)
        optimiser.zero_grad()
        losses["total"].backward()
        optimiser.step()
        totals.append(float(losses["total"].detach()))
    assert set(losses) == {"hard", "soft", "hidden", "total"} and totals[-1] < 0.7 * totals[0]
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))


def test_hidden_weight_fades_out() -> None:
    weights = DistillWeights(hidden=2.0, hidden_until=0.5)
    assert [weights.hidden_at(p) for p in (0.0, 0.25, 0.5, 1.0)] == [2.0, 1.0, 0.0, 0.0]


def test_soft_loss_is_nothing_for_equal_logits_and_grows_with_distance() -> None:
    logits = torch.randn(5, 7)
    assert soft_target_loss(logits, logits, 2.0).abs() < 1e-6
    assert soft_target_loss(logits + torch.randn(5, 7), logits, 2.0) > 1e-3


def test_layers_are_paired_evenly_to_the_last() -> None:
    assert layer_map(2, 4) == [(1, 2), (2, 4)]
    assert layer_map(5, 6)[-1] == (5, 6)
    with pytest.raises(ValueError, match="cannot follow"):
        layer_map(5, 4)


def test_bad_pairs_and_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot build a student"):
        student_config(GPT2Config(), SHAPE)
    with pytest.raises(ValueError, match="multiple"):
        StudentShape(16, 32, 2, 3, 2, 8)
    with pytest.raises(ValueError, match="at least 1"):
        StudentShape(0, 32, 2, 2, 1, 8)
    small = LlamaForCausalLM(LlamaConfig(**(SIZES | {"vocab_size": 40})))
    with pytest.raises(ValueError, match="vocabulary"):
        Distiller(small, LlamaForCausalLM(LlamaConfig(**SIZES)))
