"""Questions about a photo, their answers, and the chat form of both; the check is that of the Shop task.

Expected answers come from a photo's own words. Draws no pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Literal, get_args

from shop.chat import END, IMAGE, PREFIX
from shop.pictures import Photo
from shop.question import facts

PictureKind = Literal["price", "colour", "product", "all"]
PICTURE_KINDS: tuple[PictureKind, ...] = get_args(PictureKind)

_ASKS: dict[PictureKind, tuple[str, ...]] = {
    "price": ("What is the price?", "How much does it cost?", "Tell me the price."),
    "colour": ("What colour is it?", "Which colour does it have?", "Tell me the colour."),
    "product": ("What is it?", "Which item is it?", "Name the item."),
    "all": ("What is on the picture?", "Tell me what you see.", "List what is on the picture."),
}
_ANSWERS: dict[PictureKind, str] = {
    "price": "The {name} costs ${price}.",
    "colour": "The {name} is {colour}.",
    "product": "The item is the {name}.",
    "all": "The {name} is {colour}. The {name} costs ${price}.",
}


@dataclass(frozen=True, slots=True)
class PictureQuestion:
    """A question about a photo, the right answer, and the facts that any right answer states in order."""

    kind: PictureKind
    text: str
    answer: str
    check: tuple[str, ...]

    def is_correct(self, answer_text: str) -> bool:
        return facts(answer_text) == self.check


def ask(rng: Random, photo: Photo, kind: PictureKind) -> PictureQuestion:
    """Draw one wording of a question of `kind`."""
    answer = _ANSWERS[kind].format(name=photo.name, colour=photo.colour, price=photo.price)
    return PictureQuestion(kind, rng.choice(_ASKS[kind]), answer, facts(answer))


def picture_messages(question: PictureQuestion, image: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """The user's message, picture first, as OpenAI's chat API takes it; `image` is its content part."""
    return [
        {"role": "user", "content": [image or {"type": "image"}, {"type": "text", "text": question.text}]}
    ]


def picture_prompt(question: PictureQuestion, num_image_tokens: int = 1) -> str:
    """The text that the model's chat template makes of `picture_messages`, the picture's token repeated."""
    return f"{PREFIX['user']}{IMAGE * num_image_tokens}{question.text}{END}{PREFIX['assistant']}"


def chat_text(questions: Sequence[PictureQuestion], is_text_first: bool = False) -> str:
    """A whole chat about one picture, to learn from; the picture stands in the first message, once."""
    first = questions[0].text
    opening = f"{first}{IMAGE}" if is_text_first else f"{IMAGE}{first}"
    asked = [opening, *(question.text for question in questions[1:])]
    turns = zip(asked, questions, strict=True)
    return "".join(
        f"{PREFIX['user']}{text}{END}{PREFIX['assistant']}{question.answer}{END}" for text, question in turns
    )
