"""The trained student, exported and run on the device, answers held-out Shop questions as torch does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from longshore.device import Student
from longshore.wire import TokenEvent, decode_chat_request
from longshore_export.bundle import export_student
from shop.chat import messages
from shop.models import MODELS
from shop.question import KINDS, make_question
from shop.sheet import make_sheet, split_rng

MODEL = MODELS / "shop-student"
NUM_QUESTIONS = 24
LEAST_RIGHT = 0.9


@pytest.mark.skipif(not MODEL.is_dir(), reason="the trained student is not in this checkout")
def test_the_trained_student_answers_questions(tmp_path: Path) -> None:
    export_student(MODEL, tmp_path / "bundle")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    rng, num_right = split_rng("heldout", 2026), 0
    with Student(tmp_path / "bundle") as student:
        for number in range(NUM_QUESTIONS):
            sheet = make_sheet(rng, rng.randint(2, 8), "heldout")
            question = make_question(rng, sheet, KINDS[number % len(KINDS)])
            chat = messages(sheet, question)
            request = decode_chat_request(
                {"model": "shop", "messages": chat, "temperature": 0, "max_tokens": 128}
            )
            events = list(student.stream(request))
            num_right += question.is_correct("".join(event.text for event in events))
            if number < len(KINDS):
                ours = [event.mark.token_id for event in events if isinstance(event, TokenEvent)]
                assert ours == _torchs(model, tokenizer, chat)
    assert num_right / NUM_QUESTIONS >= LEAST_RIGHT


def _torchs(model: AutoModelForCausalLM, tokenizer: AutoTokenizer, chat: list[dict[str, str]]) -> list[int]:
    """The greedy answer through transformers' own template and loop, its end token left out."""
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    whole = model.generate(**prompt, max_new_tokens=128, do_sample=False)[0]
    answer: list[int] = whole[prompt["input_ids"].shape[1] :].tolist()
    return answer[:-1] if answer[-1] == tokenizer.eos_token_id else answer
