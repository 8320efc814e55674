"""Measures a Shop model on held-out sheets: exact match of the checkable part, per kind of question.

Greedy answers to fresh single-turn prompts, checked by the generator. Never trains and never writes weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from shop.chat import END, messages, render
from shop.data import LARGEST_SHEET, SMALLEST_SHEET
from shop.question import KINDS, Kind, Question, chance_level, make_question
from shop.sheet import Sheet, make_sheet, split_rng

MAX_ANSWER_TOKENS = 200


@dataclass(frozen=True, slots=True)
class Score:
    """Accuracy of one kind, with the mean chance level of its questions beside it."""

    num_questions: int
    num_correct: int
    chance: float

    @property
    def accuracy(self) -> float:
        return self.num_correct / self.num_questions


def heldout_questions(num_per_kind: int, seed: int = 0) -> Iterator[tuple[Sheet, Question]]:
    """Held-out questions, each about a sheet of its own, with sheet sizes taken in turn."""
    rng = split_rng("heldout", seed)
    sizes = range(SMALLEST_SHEET, LARGEST_SHEET + 1)
    for kind in KINDS:
        for i in range(num_per_kind):
            sheet = make_sheet(rng, sizes[i % len(sizes)], "heldout")
            yield sheet, make_question(rng, sheet, kind)


@torch.no_grad()
def greedy_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], batch_size: int
) -> list[str]:
    """Greedy answers through transformers' own generate, left-padded batches with a KV cache."""
    tokenizer.padding_side = "left"
    answers: list[str] = []
    for first in range(0, len(prompts), batch_size):
        inputs = tokenizer(
            prompts[first : first + batch_size], return_tensors="pt", padding=True, add_special_tokens=False
        ).to(model.device)
        output = model.generate(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            do_sample=False,
            max_new_tokens=MAX_ANSWER_TOKENS,
        )
        answers += tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return answers


def evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, num_per_kind: int, seed: int = 0
) -> dict[Kind, Score]:
    """Scores by kind over `num_per_kind` held-out questions of each."""
    asked = list(heldout_questions(num_per_kind, seed))
    order = sorted(range(len(asked)), key=lambda i: len(asked[i][1].answer))  # alike lengths share a batch
    prompts = [render(messages(*asked[i])) for i in order]
    batch_size = 256 if model.device.type == "cuda" else 12
    by_index = dict(zip(order, greedy_answers(model, tokenizer, prompts, batch_size), strict=True))
    scores: dict[Kind, Score] = {}
    for kind in KINDS:
        ours = [i for i, (_, question) in enumerate(asked) if question.kind == kind]
        correct = sum(asked[i][1].is_correct(by_index[i]) for i in ours)
        chance = sum(chance_level(kind, asked[i][0]) for i in ours) / len(ours)
        scores[kind] = Score(len(ours), correct, chance)
    return scores


def overall(scores: dict[Kind, Score]) -> float:
    return sum(s.num_correct for s in scores.values()) / sum(s.num_questions for s in scores.values())


def report(scores: dict[Kind, Score]) -> dict[str, object]:
    by_kind = {
        kind: {**asdict(score), "accuracy": round(score.accuracy, 4)} for kind, score in scores.items()
    }
    return {"overall": round(overall(scores), 4), "kinds": by_kind}


def evaluate_folder(path: Path, num_per_kind: int, seed: int = 0, device: str = "cpu") -> dict[str, object]:
    """Load a model folder as anyone would, and score it; fp32 arithmetic on the CPU, bf16 on a GPU."""
    warnings.filterwarnings("ignore", message=".*generation flags.*")
    tokenizer = AutoTokenizer.from_pretrained(path)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()
    return report(evaluate(model, tokenizer, num_per_kind, seed))


class QuickEvaluation:
    """Exact answers under teacher forcing: greedy decoding's verdict, word for word, in one forward pass.

    A lower bound of the real score, since another wording counts as wrong. For curves during training.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, num_per_kind: int, device: str, seed: int = 1):
        asked = list(heldout_questions(num_per_kind, seed))
        prompts = [render(messages(*pair)) for pair in asked]
        texts = [prompt + question.answer + END for prompt, (_, question) in zip(prompts, asked, strict=True)]
        tokenizer.padding_side = "right"
        whole = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        starts = torch.tensor([len(ids) for ids in tokenizer(prompts, add_special_tokens=False).input_ids])
        place = torch.arange(whole.input_ids.shape[1])
        self.answer = ((place >= starts[:, None]) & whole.attention_mask.bool()).to(device)
        self.input_ids = whole.input_ids.to(device)
        self.num_per_kind = num_per_kind

    @torch.no_grad()
    def __call__(self, model: PreTrainedModel) -> dict[str, float]:
        predicted = torch.cat(
            [model(ids, use_cache=False).logits.argmax(-1) for ids in self.input_ids.split(256)]
        )
        wrong = (predicted[:, :-1] != self.input_ids[:, 1:]) & self.answer[:, 1:]
        exact = (~wrong.any(dim=1)).view(len(KINDS), self.num_per_kind).float().mean(dim=1).tolist()
        by_kind = {kind: round(value, 4) for kind, value in zip(KINDS, exact, strict=True)}
        return {"overall": round(sum(exact) / len(exact), 4), **by_kind}
