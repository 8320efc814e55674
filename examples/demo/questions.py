"""Fresh Shop questions for the demo. Expected answers come from the generator, never from a tier."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

import shop
from shop.picture_questions import PictureKind, PictureQuestion, ask, picture_messages
from shop.pictures import draw_photo, make_photo


@dataclass(frozen=True, slots=True)
class Case:
    """One question as a client asks it, and how to tell whether an answer is right."""

    messages: list[dict[str, Any]]
    question: shop.Question | PictureQuestion
    num_items: int

    def is_correct(self, answer_text: str) -> bool:
        """True when the answer states exactly the expected facts."""
        return self.question.is_correct(answer_text)


def case(rng: Random, kind: shop.Kind, num_items: int) -> Case:
    """A question of `kind` about a fresh sheet of `num_items` items."""
    sheet = shop.make_sheet(rng, num_items, "heldout")
    question = shop.make_question(rng, sheet, kind)
    return Case(shop.messages(sheet, question), question, num_items)


def photo_case(rng: Random, kind: PictureKind) -> Case:
    """A question about a fresh photo of something on offer, in all its detail."""
    photo = make_photo(rng, "heldout")
    question = ask(rng, photo, kind)
    picture = {"type": "image", "image": draw_photo(photo), "detail": "high"}
    return Case(picture_messages(question, picture), question, 1)


def cases(rng: Random) -> Iterator[Case]:
    """Endless short questions of every kind but lists, on sheets of 2 to 8 items."""
    kinds = [kind for kind in shop.KINDS if kind != "list"]
    while True:
        rng.shuffle(kinds)
        for kind in kinds:
            yield case(rng, kind, rng.randint(2, 8))
