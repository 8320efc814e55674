"""Training text (`python -m shop.data`): many-turn chats about one sheet, and shards of their token ids.

Shards are written by separate processes that never import torch; a shard depends on its number alone, so that
any run sees the same data. Never used to evaluate.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from shop.chat import END, PREFIX, render, system_message
from shop.question import KINDS, Kind, Question, make_question
from shop.sheet import Sheet, Split, make_sheet, split_rng

if TYPE_CHECKING:
    import numpy as np

KIND_WEIGHTS: dict[Kind, float] = {
    "price": 0.18, "colour": 0.18, "stock": 0.18, "cheaper": 0.18, "reverse": 0.23, "list": 0.05,
}  # fmt: skip
SMALLEST_SHEET, LARGEST_SHEET = 2, 8
TOKENS_PER_TURN = 22  # a low guess: a row that turns out longer is cut to length
ROWS_PER_DRAW = 64


@dataclass(frozen=True, slots=True)
class Curriculum:
    """Sheets of at most 3 items for `easy_shards`, then one item more every `shards_per_item` shards."""

    easy_shards: int = 6
    shards_per_item: int = 2

    def max_items(self, shard: int) -> int:
        past_easy = max(0, shard - self.easy_shards + self.shards_per_item) // self.shards_per_item
        return min(LARGEST_SHEET, SMALLEST_SHEET + 1 + past_easy)

    @classmethod
    def of(cls, folder: Path) -> Curriculum:
        """The curriculum that the shards in `folder` were written by."""
        return cls(**json.loads((folder / "curriculum.json").read_text(encoding="utf-8")))


def questions(rng: Random, sheet: Sheet, num_questions: int) -> Iterator[Question]:
    """`num_questions` questions about one sheet, few of them twice."""
    asked: set[str] = set()
    kinds = rng.choices(KINDS, [KIND_WEIGHTS[kind] for kind in KINDS], k=num_questions)
    for kind in kinds:
        question = make_question(rng, sheet, kind)
        for _ in range(3):
            if question.check not in asked:
                break
            question = make_question(rng, sheet, rng.choice(KINDS[:-1]))
        asked.add(question.check)
        yield question


def turns(rng: Random, sheet: Sheet, num_turns: int) -> Iterator[str]:
    """The same, rendered with their answers."""
    for question in questions(rng, sheet, num_turns):
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


def make_shard(shard: int, num_rows: int, row_tokens: int, tokenizer_file: Path, largest: int) -> np.ndarray:
    """int16 [num_rows, row_tokens]; every row is full, so training needs no padding."""
    import numpy as np
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    rng = split_rng("train", shard)
    return np.array(list(_rows(rng, tokenizer, num_rows, row_tokens, largest)), dtype=np.int16)


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard_{shard:04d}.npy"


def _write_shard(
    folder: Path, shard: int, num_rows: int, row_tokens: int, tokenizer_file: Path, largest: int
) -> None:
    import numpy as np

    done = shard_path(folder, shard)
    if done.exists():
        return
    part = done.with_suffix(f".{os.getpid()}.part")
    with part.open("wb") as file:
        np.save(file, make_shard(shard, num_rows, row_tokens, tokenizer_file, largest))
    part.rename(done)  # a reader sees a whole shard or none


def write_shards(
    folder: Path,
    num_shards: int,
    num_rows: int,
    row_tokens: int,
    curriculum: Curriculum,
    tokenizer_file: Path,
    num_processes: int,
) -> None:
    """Write all shards, in order, with `num_processes` spawned processes; returns after the last one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "curriculum.json").write_text(json.dumps(asdict(curriculum)) + "\n", encoding="utf-8")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
        jobs = [
            pool.submit(
                _write_shard, folder, shard, num_rows, row_tokens, tokenizer_file, curriculum.max_items(shard)
            )
            for shard in range(num_shards)
        ]
        for job in jobs:
            job.result()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="shop.data", description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--num-shards", type=int, default=32)
    parser.add_argument("--shard-rows", type=int, default=8192)
    parser.add_argument("--row-tokens", type=int, default=512)
    parser.add_argument("--easy-shards", type=int, default=6)
    parser.add_argument("--shards-per-item", type=int, default=2)
    parser.add_argument("--processes", type=int, default=1)
    a = parser.parse_args(argv)
    curriculum = Curriculum(a.easy_shards, a.shards_per_item)
    tokenizer_file = Path(__file__).parent / "tokenizer" / "tokenizer.json"
    write_shards(a.data, a.num_shards, a.shard_rows, a.row_tokens, curriculum, tokenizer_file, a.processes)


if __name__ == "__main__":
    main()
