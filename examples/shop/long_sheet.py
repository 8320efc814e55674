"""Look-ups in long contexts, dense and sparse (`python -m shop.long_sheet`): what sparsity costs in answers.

Asks a Shop model through the native engine about held-out sheets, right after the sheet or after many other
turns, in the way that the model was trained on; every answer is checked by the generator. Never trains.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from tokenizers import Tokenizer

from longshore_server.native import EngineConfig, NativeEngine, SamplingParams
from longshore_server.native.config import KV_CACHE_DTYPES
from shop.chat import render, system_message
from shop.data import turns
from shop.models import MODELS
from shop.question import Kind, Question, make_question
from shop.sheet import Sheet, make_sheet, split_rng

KINDS: tuple[Kind, ...] = ("price", "colour", "stock", "reverse")
MODES = {
    "dense": "dense",
    "sink + window, 160 tokens": "sink=16 window=128 dense_layers=0,1 dense_below=0",
    "sink + window + top pages, 160 tokens": "sink=16 window=64 top_pages=4 dense_layers=0,1 dense_below=0",
    "sink + window, 256 tokens": "sink=16 window=224 dense_layers=0,1 dense_below=0",
    "sink + window + top pages, 256 tokens": "sink=16 window=64 top_pages=10 dense_layers=0,1 dense_below=0",
}
MAX_ANSWER_TOKENS = 40


@dataclass(frozen=True, slots=True)
class LookUp:
    """A prompt whose last question is about something on the sheet that no earlier turn has told."""

    prompt: str
    question: Question


def make_look_ups(num_questions: int, num_items: int, num_turns: int, seed: int = 0) -> Iterator[LookUp]:
    """Questions of four kinds in turn, each about a held-out sheet of its own."""
    rng = split_rng("heldout", seed)
    for index in range(num_questions):
        sheet = make_sheet(rng, num_items, "heldout")
        kind = KINDS[index % len(KINDS)]
        question = make_question(rng, sheet, kind)
        earlier = _turns_without(rng, sheet, question, num_turns)
        chat = render([system_message(sheet)], add_generation_prompt=False) + "".join(earlier)
        yield LookUp(chat + render([{"role": "user", "content": question.text}]), question)


def _turns_without(rng: Random, sheet: Sheet, question: Question, num_turns: int) -> list[str]:
    """Turns that do not state the line asked for; a listing states every line and is left out."""
    kept: list[str] = []
    while len(kept) < num_turns:
        kept += [turn for turn in turns(rng, sheet, 8) if not _tells(turn, sheet, question)]
    return kept[:num_turns]


def _tells(turn: str, sheet: Sheet, question: Question) -> bool:
    return any(f" {item.name}" in turn for item in sheet.items if item.name in question.check) or (
        turn.count(". The") >= 2
    )


def accuracy(config: EngineConfig, look_ups: list[LookUp], tokenizer: Tokenizer) -> tuple[float, float]:
    """Share of right answers, and CPU seconds."""
    engine = NativeEngine(config)
    prompts = [tokenizer.encode(each.prompt, add_special_tokens=False).ids for each in look_ups]
    start_s = time.process_time()
    answers = engine.generate(prompts, SamplingParams(max_tokens=MAX_ANSWER_TOKENS, temperature=0.0))
    elapsed_s = time.process_time() - start_s
    texts = tokenizer.decode_batch(answers)
    right = sum(each.question.is_correct(text) for each, text in zip(look_ups, texts, strict=True))
    return right / len(look_ups), elapsed_s


def engine_config(model: Path, sparsity: str, **settings: Any) -> EngineConfig:
    return EngineConfig(
        model=str(model), attention_sparsity=sparsity, batch_invariant=False, max_num_seqs=8, **settings
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="shop.long_sheet", description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=MODELS / "shop-teacher")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kv-cache-dtype", default="auto", choices=KV_CACHE_DTYPES)
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--shapes", nargs="+", default=["8x0", "8x8", "8x14", "16x0"], help="items x earlier turns"
    )
    args = parser.parse_args(argv)
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    for shape in args.shapes:
        num_items, num_turns = map(int, shape.split("x"))
        look_ups = list(make_look_ups(args.questions, num_items, num_turns, args.seed))
        lengths = [len(tokenizer.encode(each.prompt, add_special_tokens=False).ids) for each in look_ups]
        mean = sum(lengths) / len(lengths)
        if not args.json:
            print(f"{num_items} items, {num_turns} earlier turns, {mean:.0f} tokens")
        for name, sparsity in MODES.items():
            config = engine_config(args.model, sparsity, kv_cache_dtype=args.kv_cache_dtype)
            share, elapsed_s = accuracy(config, look_ups, tokenizer)
            row = {"items": num_items, "turns": num_turns, "tokens": mean, "mode": name, "accuracy": share}
            print(json.dumps(row) if args.json else f"  {name:40}{share:8.1%}{elapsed_s:8.1f} s", flush=True)


if __name__ == "__main__":
    main()
