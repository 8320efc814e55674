"""Shop questions as a task file (`python -m shop.task`), for the export's quality gate and its calibration.

One JSON object a line: messages, expected answer, and a pattern that finds the facts in an answer. Held-out
sheets unless told otherwise.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator

from shop.chat import messages
from shop.data import LARGEST_SHEET, SMALLEST_SHEET
from shop.question import KINDS, make_question
from shop.sheet import COLOURS, NAMES, Split, make_sheet, split_rng

PATTERN = rf"\$?\d+|\b(?:{'|'.join([*NAMES, *COLOURS])})\b"


def task_lines(split: Split, num_per_kind: int, seed: int) -> Iterator[str]:
    """`num_per_kind` questions of each kind, each about a sheet of its own, sizes taken in turn."""
    rng = split_rng(split, seed)
    sizes = range(SMALLEST_SHEET, LARGEST_SHEET + 1)
    for kind in KINDS:
        for number in range(num_per_kind):
            sheet = make_sheet(rng, sizes[number % len(sizes)], split)
            question = make_question(rng, sheet, kind)
            entry = {"messages": messages(sheet, question), "expected": question.answer, "pattern": PATTERN}
            yield json.dumps(entry)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--split", choices=("train", "heldout"), default="heldout")
    parser.add_argument("--num-per-kind", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for line in task_lines(args.split, args.num_per_kind, args.seed):
        print(line)


if __name__ == "__main__":
    main()
