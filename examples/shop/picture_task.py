"""Questions about photos as a task file (`python -m shop.picture_task`), for the export's quality gate.

One JSON object a line: messages with the photo as a data: URL, expected answer, and the pattern of the facts.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
from collections.abc import Iterator

from shop.picture_questions import PICTURE_KINDS, ask, picture_messages
from shop.pictures import draw_photo, make_photo
from shop.sheet import Split, split_rng
from shop.task import PATTERN

JPEG_QUALITY = 92


def picture_task_lines(split: Split, num_photos: int, seed: int) -> Iterator[str]:
    """One question about each photo, its kinds taken in turn."""
    rng = split_rng(split, seed)
    for number in range(num_photos):
        photo, out = make_photo(rng, split), io.BytesIO()
        draw_photo(photo).save(out, "JPEG", quality=JPEG_QUALITY)
        url = f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"
        question = ask(rng, photo, PICTURE_KINDS[number % len(PICTURE_KINDS)])
        messages = picture_messages(question, {"type": "image_url", "image_url": {"url": url}})
        yield json.dumps({"messages": messages, "expected": question.answer, "pattern": PATTERN})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--split", choices=("train", "heldout"), default="heldout")
    parser.add_argument("--photos", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for line in picture_task_lines(args.split, args.photos, args.seed):
        print(line)


if __name__ == "__main__":
    main()
