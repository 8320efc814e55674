"""Questions about a sheet, their expected answers, and the check of an answer's facts.

Expected answers come from here and nowhere else. Never looks at who gave an answer.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from math import factorial, prod
from random import Random
from typing import Literal, get_args

from shop.sheet import COLOURS, NAMES, Sheet

Kind = Literal["price", "colour", "stock", "cheaper", "reverse", "list"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_FACT_WORDS = frozenset(NAMES) | frozenset(COLOURS)
_CANDIDATE = re.compile(r"\$?\d+|[a-z]+")


def facts(text: str) -> tuple[str, ...]:
    """The checkable part of an answer: its item names, colours, prices and counts, in order."""
    found = _CANDIDATE.findall(text.lower())
    return tuple(word for word in found if word[-1].isdigit() or word in _FACT_WORDS)


@dataclass(frozen=True, slots=True)
class Question:
    """A question, the generator's own answer, and the facts that a right answer states in order."""

    kind: Kind
    text: str
    answer: str
    check: tuple[str, ...]

    def is_correct(self, answer_text: str) -> bool:
        """True when the answer states exactly the expected facts, however it words them."""
        return facts(answer_text) == self.check


def _question(kind: Kind, text: str, answer: str) -> Question:
    return Question(kind, text, answer, facts(answer))


def _price(rng: Random, sheet: Sheet) -> Question:
    item = rng.choice(sheet.items)
    asks = ("How much does the {} cost?", "What is the price of the {}?", "Tell me the price of the {}.")
    return _question("price", rng.choice(asks).format(item.name), f"The {item.name} costs ${item.price}.")


def _colour(rng: Random, sheet: Sheet) -> Question:
    item = rng.choice(sheet.items)
    asks = ("What colour is the {}?", "Which colour does the {} have?", "Tell me the colour of the {}.")
    return _question("colour", rng.choice(asks).format(item.name), f"The {item.name} is {item.colour}.")


def _stock(rng: Random, sheet: Sheet) -> Question:
    item = rng.choice(sheet.items)
    asks = (
        "How many units of the {} are in stock?",
        "What is the stock of the {}?",
        "How many of the {} are left?",
    )
    return _question(
        "stock", rng.choice(asks).format(item.name), f"The {item.name} has {item.stock} in stock."
    )


def _cheaper(rng: Random, sheet: Sheet) -> Question:
    one, two = rng.sample(sheet.items, 2)
    asks = (
        "Which is cheaper, the {} or the {}?",
        "Which one costs less: the {} or the {}?",
        "Is the {} or the {} cheaper?",
    )
    winner = one if one.price < two.price else two
    prices = f"The {one.name} costs ${one.price} and the {two.name} costs ${two.price}"
    return _question(
        "cheaper", rng.choice(asks).format(one.name, two.name), f"{prices}, so the {winner.name} is cheaper."
    )


def _reverse(rng: Random, sheet: Sheet) -> Question:
    coloured = sheet.uniquely_coloured()
    if coloured and rng.random() < 0.5:
        item = rng.choice(coloured)
        asks = ("Which item is {}?", "What is the {} item?", "Name the {} item.")
        return _question(
            "reverse", rng.choice(asks).format(item.colour), f"The {item.colour} item is the {item.name}."
        )
    item = rng.choice(sheet.items)
    asks = ("Which item costs ${}?", "What can I buy for exactly ${}?", "Name the item with the price ${}.")
    return _question(
        "reverse", rng.choice(asks).format(item.price), f"The ${item.price} item is the {item.name}."
    )


def _list(rng: Random, sheet: Sheet) -> Question:
    asks = ("List every item on the sheet.", "What is on the sheet?", "Read me the whole sheet.")
    return _question("list", rng.choice(asks), " ".join(item.line for item in sheet.items))


_MAKERS: dict[Kind, Callable[[Random, Sheet], Question]] = {
    "price": _price,
    "colour": _colour,
    "stock": _stock,
    "cheaper": _cheaper,
    "reverse": _reverse,
    "list": _list,
}


def make_question(rng: Random, sheet: Sheet, kind: Kind) -> Question:
    """Draw one question of `kind`; ValueError when the kind is unknown or the sheet is too small for it."""
    if kind not in _MAKERS:
        raise ValueError(f"unknown kind of question: {kind!r}")
    if kind == "cheaper" and len(sheet.items) < 2:
        raise ValueError("a 'cheaper' question needs a sheet of at least two items")
    return _MAKERS[kind](rng, sheet)


def chance_level(kind: Kind, sheet: Sheet) -> float:
    """Accuracy of a right-looking answer whose looked-up value is drawn at random from the sheet.

    A 'cheaper' answer counts as a coin toss between the two, its prices given; a 'list' answer as every
    attribute shuffled among the items.
    """
    num_items = len(sheet.items)
    if kind == "cheaper":
        return 0.5
    if kind == "list":
        colours = Counter(item.colour for item in sheet.items)
        return prod(map(factorial, colours.values())) / factorial(num_items) ** 3  # colours, prices and stock
    if kind == "colour":
        counts = Counter(item.colour for item in sheet.items)
        return sum(count**2 for count in counts.values()) / num_items**2
    return 1.0 / num_items
