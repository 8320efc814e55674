"""The committed Shop models answer held-out questions, and a random one does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from shop import random_model
from shop.evaluate import evaluate_folder
from shop.models import MODELS


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize(("which", "floor"), [("shop-teacher", 0.97), ("shop-student", 0.90)])
def test_committed_model_answers_heldout_questions(which: str, floor: float) -> None:
    result = evaluate_folder(MODELS / which, num_per_kind=4, seed=11)
    assert result["overall"] >= floor, result


def test_random_weights_answer_nothing(tmp_path: Path) -> None:
    result = evaluate_folder(random_model(tmp_path, "tiny"), num_per_kind=1, seed=11)
    assert result["overall"] == 0.0, result


@pytest.mark.parametrize(
    ("which", "least", "most"), [("shop-teacher", 8e6, 12e6), ("shop-student", 1.5e6, 2.5e6)]
)
def test_committed_models_have_the_stated_size(which: str, least: float, most: float) -> None:
    config = AutoConfig.from_pretrained(MODELS / which)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert least <= model.num_parameters() <= most
    assert config.max_position_embeddings >= 1024 and config.model_type == "llama"
