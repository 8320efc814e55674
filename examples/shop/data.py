"""Training text: many-turn chats about one sheet, and the shards of token ids made of them.

Shards are written by separate processes that never import torch; a shard depends on its number alone, so that
any run sees the same data. Never used to evaluate.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from shop.chat import END, PREFIX, render, system_message
from shop.question import KINDS, Kind, make_question
from shop.sheet import Sheet, Split, make_sheet, split_rng

if TYPE_CHECKING:
    import numpy as np

KIND_WEIGHTS: dict[Kind, float] = {
    "price": 0.18, "colour": 0.18, "stock": 0.18, "cheaper": 0.18, "reverse": 0.22, "list": 0.06,
}  # fmt: skip
SMALLEST_SHEET, LARGEST_SHEET = 2, 8
SHARDS_PER_ITEM = 2
"""The curriculum: the first shards hold sheets of at most 3 items, and each second shard allows one more."""
TOKENS_PER_TURN = 22  # a low guess: a row that turns out longer is cut to length
ROWS_PER_DRAW = 64


def max_items(shard: int) -> int:
    return min(LARGEST_SHEET, SMALLEST_SHEET + 1 + shard // SHARDS_PER_ITEM)


def turns(rng: Random, sheet: Sheet, num_turns: int) -> Iterator[str]:
    """`num_turns` rendered question and answer pairs; a question comes twice only when all others are used up."""
    asked: set[str] = set()
    kinds = rng.choices(KINDS, [KIND_WEIGHTS[kind] for kind in KINDS], k=num_turns)
    for kind in kinds:
        question = make_question(rng, sheet, kind)
        for _ in range(3):
            if question.check not in asked:
                break
            question = make_question(rng, sheet, rng.choice(KINDS[:-1]))
        asked.add(question.check)
        yield f"{PREFIX['user']}{question.text}{END}{PREFIX['assistant']}{question.answer}{END}"


def chat_text(rng: Random, num_items: int, num_turns: int, split: Split = "train") -> str:
    """One chat of many turns about one fresh sheet, as text with the chat template's markers."""
    sheet = make_sheet(rng, num_items, split)
    return render([system_message(sheet)], add_generation_prompt=False) + "".join(
        turns(rng, sheet, num_turns)
    )


def _rows(rng: Random, tokenizer: Any, num_rows: int, row_tokens: int, largest: int) -> Iterator[list[int]]:
    while num_rows > 0:
        texts = [
            chat_text(rng, rng.randint(SMALLEST_SHEET, largest), row_tokens // TOKENS_PER_TURN + 1)
            for _ in range(min(num_rows, ROWS_PER_DRAW))
        ]
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        full = [encoding.ids[:row_tokens] for encoding in encodings if len(encoding.ids) >= row_tokens]
        yield from full
        num_rows -= len(full)


def make_shard(shard: int, num_rows: int, row_tokens: int, tokenizer_file: Path, seed: int = 0) -> np.ndarray:
    """int16 [num_rows, row_tokens]; every row is full, so training needs no padding."""
    import numpy as np
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    rng = split_rng("train", seed * 1_000_000 + shard)
    return np.array(list(_rows(rng, tokenizer, num_rows, row_tokens, max_items(shard))), dtype=np.int16)


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard_{shard:04d}.npy"


def _write_shard(folder: Path, shard: int, num_rows: int, row_tokens: int, tokenizer_file: Path) -> None:
    import numpy as np

    done = shard_path(folder, shard)
    if done.exists():
        return
    part = done.with_suffix(f".{os.getpid()}.part")
    with part.open("wb") as file:
        np.save(file, make_shard(shard, num_rows, row_tokens, tokenizer_file))
    part.rename(done)  # a reader sees a whole shard or none


def write_shards(
    folder: Path, num_shards: int, num_rows: int, row_tokens: int, tokenizer_file: Path, num_processes: int
) -> None:
    """Write all shards, in order, with `num_processes` spawned processes; returns when the last one is there."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
        jobs = [
            pool.submit(_write_shard, folder, shard, num_rows, row_tokens, tokenizer_file)
            for shard in range(num_shards)
        ]
        for job in jobs:
            job.result()
